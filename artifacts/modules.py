"""What a first-party module defines, imports, and does when it is imported: read from its source, never executed."""

from __future__ import annotations

import ast
import functools
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from artifacts import syntax
from artifacts.syntax import Function, References

FIRST_PARTY = ("flows", "tasks", "quant", "artifacts", "reasoning_qat")
_CONSTRUCTORS = frozenset({"__init__", "__new__", "__post_init__", "model_post_init"})


@dataclass(frozen=True)
class Target:
    """What an imported name stands for: a module, or something in it."""

    module: str
    name: str | None = None


@dataclass
class Module:
    """The parts of a module that names lead to."""

    name: str
    path: str
    """Relative to the root, with forward slashes."""
    is_package: bool
    folder: Path
    definitions: dict[str, list[ast.stmt]] = field(default_factory=dict)
    """The statements that bind a name, in order."""
    imports: dict[str, list[Target]] = field(default_factory=dict)
    """What a name stands for that an import statement of the module binds."""
    stars: list[str] = field(default_factory=list)
    """Modules of `from x import *`."""
    loads: set[str] = field(default_factory=set)
    """Names of first-party modules that importing it imports, where they are modules."""
    does: list[ast.stmt] = field(default_factory=list)
    """Statements that do something when it is imported: calls, assignments to parts, branches and loops."""
    constructs: list[tuple[ast.stmt, tuple[str, ...]]] = field(default_factory=list)
    """Assignments that make an object of a class, which may register itself, with the class's name."""
    bound: set[str] = field(default_factory=set)
    """Names that `does` binds."""
    digests: dict[tuple[Any, ...], tuple[str, References]] = field(default_factory=dict)
    """Of definitions met before."""

    @property
    def package(self) -> str:
        return self.name if self.is_package else self.name.rpartition(".")[0]

    def knows(self, name: str) -> bool:
        return name in self.definitions or name in self.imports or name in self.bound


def source_path(name: str, root: Path) -> Path | None:
    """The file of a module, None if it has none under `root`: then it is of others."""
    base = os.path.join(root, *name.split("."))
    return next((Path(path) for path in (f"{base}/__init__.py", f"{base}.py") if os.path.isfile(path)), None)


def read_module(name: str, root: Path, source: bytes | None = None) -> Module | None:
    """The module as its file is now, or with another `source`; a file that has not changed is not parsed again."""
    path = source_path(name, root)
    if path is None:
        return None
    if source is not None and source != path.read_bytes():
        return parse_module(name, source, path, root)
    state = path.stat()
    return _read(name, root, path, (state.st_mtime_ns, state.st_ctime_ns, state.st_size, state.st_ino))


@functools.lru_cache(maxsize=1024)
def _read(name: str, root: Path, path: Path, _state: tuple[int, ...]) -> Module:
    return parse_module(name, path.read_bytes(), path, root)


def parse_module(name: str, source: bytes, path: Path, root: Path) -> Module:
    """Raises SyntaxError, naming the file, for a source that is no Python."""
    tree = ast.parse(source, filename=str(path))
    syntax.mark_annotations(tree.body)
    relative = path.relative_to(root).as_posix()
    module = Module(name, relative, path.name == "__init__.py", path.parent)
    for statement in tree.body:
        _add(module, statement)
    return module


def _add(module: Module, statement: ast.stmt) -> None:
    if syntax.is_docstring(statement) or isinstance(statement, ast.Pass):
        return
    if isinstance(statement, ast.Import | ast.ImportFrom):
        _add_import(module, statement)
    elif isinstance(statement, Function | ast.ClassDef):
        module.definitions.setdefault(statement.name, []).append(statement)
        if not all(map(syntax.is_wrapper, statement.decorator_list)) or getattr(statement, "keywords", []):
            module.does.append(statement)
    elif isinstance(statement, ast.Assign | ast.AnnAssign) and _binds_names_only(statement):
        _add_constant(module, statement)
    elif is_for_type_checkers(statement):
        for inner in statement.orelse:  # type: ignore[attr-defined]
            _add(module, inner)
    else:
        module.does.append(statement)
        _add_inner(module, statement)


def _add_constant(module: Module, statement: ast.Assign | ast.AnnAssign) -> None:
    names = [name for target in _targets(statement) for name in _names(target)]
    for name in names:
        module.definitions.setdefault(name, []).append(statement)
    calls = list(syntax.calls(statement.value)) if statement.value is not None else []
    for call in calls:
        if chain := syntax.constructed(call):
            module.constructs.append((statement, chain))
        elif not syntax.only_gives_values(call):
            module.does.append(statement)
            break


def _add_inner(module: Module, statement: ast.stmt) -> None:
    """Imports and bindings inside a branch, a loop or a block at the top of a module."""
    for node in ast.walk(statement):
        if isinstance(node, ast.Import | ast.ImportFrom):
            _add_import(module, node)
        elif isinstance(node, Function | ast.ClassDef):
            module.bound.add(node.name)
        elif isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            module.bound.add(node.id)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            module.bound.add(node.name)


def _add_import(module: Module, statement: ast.Import | ast.ImportFrom) -> None:
    for name, target in imported(statement, module.package):
        if name == "*":
            module.stars.append(target.module)
        else:
            module.imports.setdefault(name, []).append(target)
    module.loads.update(loaded_by(statement, module.package))


def imported(statement: ast.Import | ast.ImportFrom, package: str) -> Iterator[tuple[str, Target]]:
    """The names that an import statement binds, and what for; `import a.b` binds a."""
    if isinstance(statement, ast.Import):
        for alias in statement.names:
            top = alias.name.partition(".")[0]
            yield (alias.asname, Target(alias.name)) if alias.asname else (top, Target(top))
    else:
        base = absolute(statement, package)
        for alias in statement.names:
            yield alias.asname or alias.name, Target(base, alias.name)


def loaded_by(statement: ast.Import | ast.ImportFrom, package: str) -> Iterator[str]:
    """Names that may be modules: `from a import b` gives a and a.b."""
    if isinstance(statement, ast.Import):
        yield from (alias.name for alias in statement.names)
    else:
        base = absolute(statement, package)
        yield base
        yield from (f"{base}.{alias.name}" for alias in statement.names if alias.name != "*")


def absolute(statement: ast.ImportFrom, package: str) -> str:
    """The module that `from ... import` names."""
    base = statement.module or ""
    if statement.level:
        parents = package.split(".")[: len(package.split(".")) - statement.level + 1]
        base = ".".join([*parents, *([base] if base else [])])
    return base


def is_for_type_checkers(statement: ast.stmt) -> bool:
    """`if TYPE_CHECKING:`, whose body never runs."""
    return isinstance(statement, ast.If) and syntax.last_name(statement.test) == "TYPE_CHECKING"


def _targets(statement: ast.Assign | ast.AnnAssign) -> list[ast.expr]:
    return statement.targets if isinstance(statement, ast.Assign) else [statement.target]


def _binds_names_only(statement: ast.Assign | ast.AnnAssign) -> bool:
    inside = (node for target in _targets(statement) for node in ast.walk(target))
    return not any(isinstance(node, ast.Attribute | ast.Subscript) for node in inside)


def _names(target: ast.expr) -> Iterator[str]:
    return (node.id for node in ast.walk(target) if isinstance(node, ast.Name))


def registers_itself(definition: ast.stmt) -> bool:
    """Whether making an object of a class runs code of its own."""
    return isinstance(definition, ast.ClassDef) and bool(_methods(definition) & _CONSTRUCTORS)


def hooks_subclasses(definition: ast.stmt) -> bool:
    """Whether deriving from a class runs code of its own."""
    return isinstance(definition, ast.ClassDef) and bool(
        "__init_subclass__" in _methods(definition)
        or definition.keywords
        or "type" in map(syntax.last_name, definition.bases)
    )


def _methods(definition: ast.ClassDef) -> set[str]:
    return {node.name for node in definition.body if isinstance(node, Function)}


@functools.lru_cache(maxsize=256)
def _files(folder: Path, _changed: int) -> frozenset[str]:
    return frozenset(os.listdir(folder))


def files_beside(module: Module) -> frozenset[str]:
    """Names of the files in the module's folder."""
    return _files(module.folder, module.folder.stat().st_mtime_ns)


def file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
