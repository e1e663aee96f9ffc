"""Syntax trees as keys see them: what changes nothing is left out, and what a tree refers to is listed.

Left out: comments, layout, docstrings (of modules, classes, functions and attributes), `pass`, and annotations that
nothing reads: those of variables and of functions without a decorator of unknown effect. Annotations in class bodies
stay, because dataclasses and pydantic read them.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

Function = ast.FunctionDef | ast.AsyncFunctionDef

_SPELLING = frozenset({"ctx", "kind", "type_comment", "type_ignores"})

# fmt: off
# Decorators that only wrap what they decorate: the definition matters where its name is used, and its annotations
# nowhere. Any other may register it somewhere.
_WRAPPERS = frozenset(
    (
        "abstractmethod", "asynccontextmanager", "cache", "cached_property", "classmethod", "contextmanager",
        "dataclass", "enable_grad", "final", "inference_mode", "lru_cache", "no_grad", "override", "overload",
        "property", "runtime_checkable", "setter", "singledispatch", "stage", "staticmethod", "total_ordering",
        "wraps",
    )
)
# Calls that give a value and do nothing else; besides them, classes, whose names begin with a capital.
_VALUES = frozenset(
    (
        "bool", "bytes", "compile", "dict", "enumerate", "float", "format", "frozenset", "get", "getLogger", "int",
        "join", "len", "list", "lower", "max", "min", "range", "removeprefix", "removesuffix", "replace", "resolve",
        "round", "set", "sorted", "split", "splitlines", "str", "strip", "sum", "tuple", "type", "upper", "version",
        "zip",
    )
)
# fmt: on
_DYNAMIC_NAMES = frozenset({"eval", "exec", "globals", "locals", "vars"})
_DYNAMIC_IMPORTS = frozenset({"import_module", "__import__"})
_LONGEST_NAME = 200  # characters of a text that may name a module or a file


@dataclass
class References:
    """What a definition mentions."""

    chains: set[tuple[str, ...]] = field(default_factory=set)
    """`a.b.c` as ("a", "b", "c"); a bare name as a tuple of one."""
    imports: list[ast.Import | ast.ImportFrom] = field(default_factory=list)
    """Import statements inside it."""
    strings: set[str] = field(default_factory=set)
    """Texts that may name a module, a package or a file."""
    looks_up: bool = False
    """It finds names of its module by text (`globals()`, `eval`), so that any may be meant."""
    imports_by_text: bool = False
    """It imports a module whose name is computed."""


def read(nodes: Sequence[ast.AST]) -> tuple[str, References]:
    """sha256 of the trees and what they refer to.

    The form that is hashed is an own one: `ast.dump` and `ast.unparse` change between Python versions.
    """
    parts: list[str] = []
    found = References()
    for node in nodes:
        _write(node, parts, found)
    return hashlib.sha256("".join(parts).encode("utf-8", "surrogatepass")).hexdigest(), found


def _write(value: object, parts: list[str], found: References | None) -> None:
    """`found` is None within a chain of names, which is noted as a whole."""
    if isinstance(value, ast.Constant):
        parts.append(f"({type(value.value).__name__} {value.value!r})")
        if found is not None and isinstance(value.value, str) and len(value.value) < _LONGEST_NAME:
            found.strings.add(value.value)
    elif isinstance(value, ast.AST):
        if found is not None:
            found = _note(value, found)
        parts.append(f"({type(value).__name__}")
        for name, item in _fields(value):
            parts.append(f" {name}=")
            _write(item, parts, found)
            if found is not None and name in ("annotation", "returns"):
                _note_quoted(item, found)
        parts.append(")")
    elif isinstance(value, list):
        parts.append("[")
        for item in value:
            _write(item, parts, found)
        parts.append("]")
    else:
        parts.append(f"{value!r},")  # an identifier, or a number of the grammar such as `level`


def _note(node: ast.AST, found: References) -> References | None:
    """Note what a node refers to; None when nothing inside it is to be noted again."""
    if isinstance(node, ast.Attribute | ast.Name) and (chain := chain_of(node)):
        found.chains.add(chain)
        found.looks_up |= chain[0] in _DYNAMIC_NAMES or chain[:2] == ("sys", "modules")
        found.imports_by_text |= chain[-1] in _DYNAMIC_IMPORTS
        return None
    if isinstance(node, ast.Import | ast.ImportFrom):
        found.imports.append(node)
    return found


def _note_quoted(annotation: ast.AST, found: References) -> None:
    """Names inside quotes, as in `list["Row"]`."""
    for node in ast.walk(annotation):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            with contextlib.suppress(SyntaxError, ValueError):
                _write(ast.parse(node.value, mode="eval"), [], found)


def _fields(node: ast.AST) -> Iterator[tuple[str, Any]]:
    """What counts of a node, by name."""
    for name in node._fields:
        item = getattr(node, name, None)
        if isinstance(item, list):
            item = without_words(item)
        if item is not None and item != [] and name not in _SPELLING and not _is_unread_annotation(node, name):
            yield name, item


def without_words(items: list[ast.AST]) -> list[ast.AST]:
    """A list of nodes without bare strings (docstrings wherever they stand) and `pass`."""
    return [item for item in items if not (isinstance(item, ast.Pass) or is_docstring(item))]


def is_docstring(node: object) -> bool:
    """A string that stands alone."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _is_unread_annotation(node: ast.AST, name: str) -> bool:
    return name in ("annotation", "returns") and getattr(node, "_unread", False)


def mark_annotations(statements: Sequence[ast.AST], in_class: bool = False) -> None:
    """Mark, in place, the nodes whose annotations nothing reads."""
    for statement in statements:
        if isinstance(statement, Function):
            if all(is_wrapper(decorator) for decorator in statement.decorator_list):
                arguments = statement.args
                every = (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)
                for node in (statement, *every, arguments.vararg, arguments.kwarg):
                    if node is not None:
                        node._unread = True  # type: ignore[union-attr]
        elif isinstance(statement, ast.AnnAssign) and not in_class:
            statement._unread = True  # type: ignore[attr-defined]
        inner = isinstance(statement, ast.ClassDef) or (in_class and not isinstance(statement, Function))
        for block in ("body", "orelse", "handlers", "finalbody", "cases"):
            mark_annotations(getattr(statement, block, ()), inner)


def last_name(node: ast.expr) -> str:
    """`c` of `a.b.c`, `a.b.c(...)` and `c`; "" for anything else."""
    if isinstance(node, ast.Call):
        return last_name(node.func)
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def is_wrapper(decorator: ast.expr) -> bool:
    """Whether the decorator does nothing but wrap."""
    return last_name(decorator) in _WRAPPERS


def only_gives_values(call: ast.Call) -> bool:
    """Whether the call changes nothing elsewhere, as far as its name tells: a class is called `constructed`."""
    return last_name(call.func) in _VALUES


def constructed(call: ast.Call) -> tuple[str, ...]:
    """The chain of names of the class that is called; empty for what is no class."""
    return chain_of(call.func) if last_name(call.func).lstrip("_")[:1].isupper() else ()


def calls(node: ast.AST) -> Iterator[ast.Call]:
    """Calls that run when the expression is computed: not those inside a lambda."""
    if isinstance(node, ast.Call):
        yield node
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.Lambda):
            yield from calls(child)


def chain_of(node: ast.expr) -> tuple[str, ...]:
    """("a", "b", "c") of `a.b.c`, empty for what is no chain of names."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return (node.id, *reversed(names)) if isinstance(node, ast.Name) else ()
