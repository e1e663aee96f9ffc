"""What of a definition counts where only a part of it does."""

from __future__ import annotations

import ast
import copy

from artifacts import syntax
from artifacts.syntax import Function


def narrowed(statement: ast.stmt, chosen: str) -> ast.stmt:
    """A table with the chosen entry alone; as it is, if it is no table of plain names or has no such entry."""
    value = getattr(statement, "value", None)
    if not isinstance(value, ast.Dict):
        return statement
    kept = [(key, entry) for key, entry in zip(value.keys, value.values, strict=True) if _text(key) in (chosen, None)]
    if all(_text(key) is None for key, _ in kept):
        return statement
    narrowed = copy.copy(statement)
    narrowed.value = ast.Dict([key for key, _ in kept], [entry for _, entry in kept])  # type: ignore[attr-defined]
    return narrowed


def _text(key: ast.expr | None) -> str | None:
    return key.value if isinstance(key, ast.Constant) and isinstance(key.value, str) else None


def without_fields(statement: ast.ClassDef) -> ast.ClassDef:
    """A configuration class without what only decides which values it takes: those are in the key."""
    kept = copy.copy(statement)
    kept.body = [inner for inner in statement.body if not (_is_field(inner) or _is_validator(inner))]
    return kept


def _is_field(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.Assign):
        return [syntax.last_name(target) for target in statement.targets] == ["model_config"]
    if not isinstance(statement, ast.AnnAssign):
        return False
    if "ClassVar" in {syntax.last_name(node) for node in ast.walk(statement.annotation) if isinstance(node, ast.expr)}:
        return syntax.last_name(statement.target) in ("unkeyed_fields", "location_fields")
    left_out = (k.arg for call in ast.walk(statement) if isinstance(call, ast.Call) for k in call.keywords)
    return "exclude" not in left_out and "PrivateAttr" not in map(syntax.last_name, syntax.calls(statement))


def _is_validator(statement: ast.stmt) -> bool:
    decorators = statement.decorator_list if isinstance(statement, Function) else []
    return any(syntax.last_name(decorator) in ("field_validator", "model_validator") for decorator in decorators)


def without_declaration(statement: ast.FunctionDef | ast.AsyncFunctionDef) -> ast.stmt:
    """A stage body without what `@stage` says of it, the kind of its artifact excepted."""
    kept = copy.copy(statement)
    kept.decorator_list = [_kind_alone(decorator) for decorator in statement.decorator_list]
    return kept


def _kind_alone(decorator: ast.expr) -> ast.expr:
    if not (isinstance(decorator, ast.Call) and syntax.last_name(decorator) == "stage"):
        return decorator
    kept = copy.copy(decorator)
    kept.keywords = [keyword for keyword in decorator.keywords if keyword.arg == "kind"]
    return kept
