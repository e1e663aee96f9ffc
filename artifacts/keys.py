"""What makes two stage runs the same: canonical bytes of plain data, and the digest of the code a stage runs.

The canonical form is tagged and length-prefixed, so different values never share bytes: 1, 1.0, True and "1"
differ, ["a", "b"] and ["ab"] differ. Dictionary order is free, and a list equals a tuple, so that a payload
read back from JSON has the key it was written under.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import math
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
FIRST_PARTY = ("flows", "tasks", "quant", "artifacts")
# How a stage is run, not what it computes: a change here must not recompute every checkpoint.
INFRASTRUCTURE = ("artifacts", "tasks.runtime.stage", "tasks.runtime.prefect_tasks")
TEMPLATE_SUFFIXES = (".j2", ".jinja")  # templates beside a module are code too


def canonical(obj: object) -> bytes:
    """Tagged canonical bytes of None, bool, int, finite float, str, bytes, and lists, tuples, dicts of them.

    Raises TypeError for any other type (subclasses too), ValueError for NaN and infinities, naming the place.
    """
    return b"".join(_encode(obj, "value"))


def digest(obj: object) -> str:
    """sha256 of ``canonical(obj)``, 64 hexadecimal digits."""
    return hashlib.sha256(canonical(obj)).hexdigest()


def _encode(obj: object, where: str) -> Iterator[bytes]:
    if isinstance(obj, list | tuple) and type(obj) in (list, tuple):
        yield b"l%d:" % len(obj)
        for index, item in enumerate(obj):
            yield from _encode(item, f"{where}[{index}]")
    elif isinstance(obj, dict) and type(obj) is dict:
        if not all(type(name) is str for name in obj):
            raise TypeError(f"{where}: dictionary keys must be str to enter a key; got {list(obj)}")
        yield b"d%d:" % len(obj)
        for name in sorted(obj):
            yield _tagged_bytes(b"s", name.encode("utf-8", "surrogatepass"))
            yield from _encode(obj[name], f"{where}.{name}")
    else:
        yield _encode_scalar(obj, where)


def _encode_scalar(obj: object, where: str) -> bytes:
    # Exact types: a numpy scalar or an enum that subclasses float or str would pass isinstance.
    if obj is None:
        return b"n;"
    if type(obj) is bool:
        return b"b1;" if obj else b"b0;"
    if type(obj) is int:
        return b"i%d;" % obj
    if type(obj) is float:
        if not math.isfinite(obj):
            raise ValueError(f"{where}: {obj} cannot enter a key; use None for 'no limit'")
        return b"f" + obj.hex().encode() + b";"
    if type(obj) is str:
        return _tagged_bytes(b"s", obj.encode("utf-8", "surrogatepass"))
    if type(obj) is bytes:
        return _tagged_bytes(b"y", obj)
    raise TypeError(
        f"{where}: {type(obj).__module__}.{type(obj).__qualname__} cannot enter a key; "
        "convert it to None, bool, int, float, str, bytes, list or dict first (a Ref by str)"
    )


def _tagged_bytes(tag: bytes, content: bytes) -> bytes:
    return tag + b"%d:" % len(content) + content


@functools.cache  # per process: the code that runs is the code that was loaded
def code_digest(module: str, root: Path = REPOSITORY) -> str:
    """sha256 over the syntax trees of `module` and of the first-party modules it imports, transitively.

    Found by reading the sources, nothing is executed: imports inside functions count, names given to
    `importlib.import_module` do not. Comments, docstrings, layout and `INFRASTRUCTURE` are left out.
    Templates beside an included module count. Raises ValueError if `module` has no source.
    """
    if _source(module, root) is None:
        raise ValueError(f"no module {module!r} under {root}: name one of {', '.join(FIRST_PARTY)}")
    trees = {name: _tree_digest(name, root) for name in sorted(_reachable(module, root))}
    return digest({"module": module, "trees": trees})


def _reachable(module: str, root: Path) -> set[str]:
    """`module`, its packages, and what they import, without infrastructure."""
    found: set[str] = set()
    pending = [module]
    while pending:
        name = pending.pop()
        if name in found or _is_infrastructure(name) or _source(name, root) is None:
            continue
        found.add(name)
        parent = name.rpartition(".")[0]
        pending.extend([parent] if parent else [])  # importing a.b runs a/__init__.py as well
        pending.extend(target for target in _imports(name, root) if target.split(".")[0] in FIRST_PARTY)
    return found


def _is_infrastructure(module: str) -> bool:
    return any(module == name or module.startswith(name + ".") for name in INFRASTRUCTURE)


def _source(module: str, root: Path) -> Path | None:
    base = root.joinpath(*module.split("."))
    return next((path for path in (base / "__init__.py", base.with_suffix(".py")) if path.is_file()), None)


@functools.cache
def _parse(module: str, root: Path) -> ast.Module:
    source = _source(module, root)
    assert source is not None
    return ast.parse(source.read_bytes(), filename=str(source))


def _imports(module: str, root: Path) -> Iterator[str]:
    """Names that may be modules: `from a import b` yields a and a.b; the caller drops what has no source."""
    source = _source(module, root)
    assert source is not None
    package = module if source.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(_parse(module, root)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


@functools.cache
def _tree_digest(module: str, root: Path) -> str:
    source = _source(module, root)
    assert source is not None
    templates = sorted(path for path in source.parent.iterdir() if path.suffix in TEMPLATE_SUFFIXES)
    return digest([_plain(_parse(module, root)), [[path.name, path.read_bytes()] for path in templates]])


def _plain(node: object) -> object:
    """The tree as nested lists. Own form: `ast.dump` and `ast.unparse` change between Python versions."""
    if isinstance(node, ast.AST):
        fields = [[name, _plain(value)] for name, value in _fields(node) if value is not None and value != []]
        return [type(node).__name__, fields]
    if isinstance(node, list):
        return [_plain(item) for item in node]
    return f"{type(node).__name__} {node!r}"  # identifiers and constants


def _fields(node: ast.AST) -> Iterator[tuple[str, object]]:
    has_docstring = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    for name, value in ast.iter_fields(node):
        if name in ("kind", "type_comment", "type_ignores"):  # spelling only: u"" prefixes and type comments
            continue
        if name == "value" and isinstance(node, ast.Constant):
            yield name, [value]  # boxed, so that the constant None is not taken for an absent field
        elif name == "body" and has_docstring and ast.get_docstring(node, clean=False) is not None:  # type: ignore[arg-type]
            yield name, value[1:]
        else:
            yield name, value
