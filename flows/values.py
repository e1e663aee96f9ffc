"""Values as people type them after `--set path=`: read by the type of the field that they are for.

Where a field takes text, what is typed is the text: `no`, `#7`, `@x` and `2024-01-01` are taken as they are; quotes
around the whole value are taken off, and `null` means none where none is allowed.  Everything else is YAML 1.2:
`3`, `1e-5`, `true`, `[42, 43]`, `{steps: 3}`.  YAML 1.1's readings of `no`, `1:30` and dates as other things are off.
"""

from __future__ import annotations

import re
import types
import typing
from typing import Any, Literal

import yaml

LONGEST = 10_000
"""Characters of one value; more is a file's content, not an option."""
_QUOTED, _COMMENT = re.compile(r"'[^']*'|\"[^\"]*\""), re.compile(r"(^|\s)#")
_NONE = ("null", "~", "")


class _Loader(yaml.SafeLoader):
    """SafeLoader with the core schema of YAML 1.2, and no aliases, which can blow a short text up."""

    yaml_implicit_resolvers: typing.ClassVar[dict[str, Any]] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.YAMLError("an alias (*) is not allowed here: quote the value")
        return super().compose_node(parent, index)


for _tag, _pattern, _first in (
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^[-+]?[0-9][0-9_]*$", list("-+0123456789")),
    ("float", r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$", list("-+.0123456789")),
    ("float", r"^(?:[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$", list("-+.")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)


def _integer(loader: _Loader, node: Any) -> int:
    return int(str(loader.construct_scalar(node)).replace("_", ""))


_Loader.add_constructor("tag:yaml.org,2002:int", _integer)


def parse_value(text: str, annotation: Any) -> Any:
    """The value that `text` is for a field of this type; ValueError says why it is none."""
    if len(text) > LONGEST:
        raise ValueError(f"a value of {len(text):,} characters; at most {LONGEST:,} are read")
    if _takes_text(annotation):
        if text in _NONE and _takes_none(annotation):
            return None
        return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text
    if _COMMENT.search(_QUOTED.sub("", text)):
        raise ValueError("'#' would begin a comment here: leave it out, or quote the text that holds it")
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError, TypeError, AttributeError) as error:
        problem = getattr(error, "problem", None) or str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"not a value ({problem}); numbers, true, false, null, [a, b] or {{key: value}}") from error


def _members(annotation: Any) -> tuple[Any, ...]:
    """The types of a union, or the one type; aliases such as Annotated are looked through."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _members(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return tuple(member for part in typing.get_args(annotation) for member in _members(part))
    return (annotation,)


def _takes_text(annotation: Any) -> bool:
    """Text and nothing that is written in another way."""
    rest = [member for member in _members(annotation) if member is not type(None)]
    return bool(rest) and all(
        member is str or (typing.get_origin(member) is Literal and all(type(v) is str for v in typing.get_args(member)))
        for member in rest
    )


def _takes_none(annotation: Any) -> bool:
    return type(None) in _members(annotation)
