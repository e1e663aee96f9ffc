"""RunConfig: a run is a set of named branches; and the overrides that a user types."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import fnmatch
import typing
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, Field, ValidationError, model_validator

from flows.branches import BranchConfig
from flows.values import parse_value
from tasks.runtime.stage import StageConfig

ALIASES = {"model": "base_model.model"}
LONGEST_MESSAGE = 300
LONGEST_SHOWN = 60
"""Characters of a given value, or of a name, in a message."""


class ConfigError(ValueError):
    """A configuration the user can mend; the message, one line, names the nearest valid choice."""

    def __init__(self, message: str) -> None:
        super().__init__(shortened(" ".join(message.split()), LONGEST_MESSAGE))


class RunConfig(StageConfig):
    """A named set of branches; their union is the workflow, and each distinct stage runs once."""

    name: str
    description: str = ""
    branches: dict[str, BranchConfig] = Field(min_length=1)
    reference: str | None = None
    """The branch that the others are compared with in the report (paired, per problem)."""
    comparisons: tuple[tuple[str, str], ...] = ()
    """Pairs of branches whose difference the report gives as well, the one expected to be better first."""

    @model_validator(mode="after")
    def _known_branches(self) -> RunConfig:
        named = {self.reference, *(label for pair in self.comparisons for label in pair)} - {None}
        if unknown := named - set(self.branches):
            raise ValueError(f"{sorted(map(str, unknown))} are no branches: {', '.join(self.branches)}")
        return self

    def select(self, patterns: Sequence[str]) -> RunConfig:
        """The run with only the branches named; case does not matter.

        A name that is no branch's is a pattern such as "W3*", or else a part of a name.
        """
        if not patterns:
            return self
        kept: set[str] = set()
        for pattern in patterns:
            found = _matching(pattern, self.branches)
            if not found:
                raise ConfigError(
                    f"no branch is called, or has in its name, {shortened(pattern)!r}; "
                    f"{nearest(pattern, list(self.branches))}"
                )
            kept.update(found)
        return self.with_branches({label: branch for label, branch in self.branches.items() if label in kept})

    def with_branches(self, branches: dict[str, BranchConfig]) -> RunConfig:
        """The run with other branches; comparisons with branches that are gone are dropped."""
        reference = self.reference if self.reference in branches else None
        comparisons = tuple(pair for pair in self.comparisons if set(pair) <= set(branches))
        return self.model_copy(update={"branches": branches, "reference": reference, "comparisons": comparisons})


def _matching(pattern: str, labels: typing.Iterable[str]) -> list[str]:
    folded = {label: label.casefold() for label in labels}
    wanted = pattern.casefold()
    exact = [label for label, name in folded.items() if name == wanted]
    alike = [label for label, name in folded.items() if fnmatch.fnmatchcase(name, wanted)]
    return exact or alike or [label for label, name in folded.items() if wanted in name]


def shortened(text: str, longest: int = LONGEST_SHOWN) -> str:
    """`text`, its middle left out where it is longer."""
    if len(text) <= longest:
        return text
    half = (longest - 3) // 2
    return f"{text[:half]}...{text[-half:]}"


def nearest(name: str, valid: Sequence[str]) -> str:
    """A hint for a mistyped name: the nearest valid one, and all of them."""
    close = difflib.get_close_matches(name[:LONGEST_SHOWN], valid, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}valid: {', '.join(valid)}"


def apply_overrides(run: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """`section.field=value` on every branch that has the section; `label:section.field=value` on one branch.

    Values are read by the type of their field (values.py); `section=null` skips a stage.  All are applied before the
    result is validated, so their order does not matter.
    Raises ConfigError for unknown keys and values that do not fit, naming the nearest valid key.
    """
    data = {label: branch.model_dump() for label, branch in run.branches.items()}
    touched: set[str] = set()
    for override in overrides:
        label, path, text = _split(override, run.branches)
        touched |= _override(data, label, ALIASES.get(path, path), text)
    try:
        return run.with_branches(
            {k: BranchConfig.model_validate(data[k]) if k in touched else v for k, v in run.branches.items()}
        )
    except ValidationError as error:
        raise ConfigError(explain(error)) from error
    except RecursionError as error:
        raise ConfigError("--set: a value is nested too deeply") from error


def _split(override: str, labels: typing.Iterable[str]) -> tuple[str, str, str]:
    """(branch or "", path, text) of an override; a branch's name may hold a colon or an equals sign."""
    label = max((known for known in labels if override.startswith(f"{known}:")), key=len, default="")
    rest = override[len(label) + 1 :] if label else override
    path, separator, text = rest.partition("=")
    if not separator:
        raise ConfigError(f"--set {shortened(override)!r}: write section.field=value, for example kd_train.steps=20")
    if not label:
        label, _, path = path.rpartition(":")
    return label, path.strip(), text


def _override(data: dict[str, dict[str, Any]], label: str, path: str, text: str) -> set[str]:
    """Set one value in the branches it is meant for; returns their labels."""
    if label and label not in data:
        raise ConfigError(f"unknown branch {shortened(label)!r}; {nearest(label, list(data))}")
    section, _, rest = path.partition(".")
    if section not in BranchConfig.model_fields:
        there = [
            name for name in BranchConfig.model_fields if any(branch[name] is not None for branch in data.values())
        ]
        hint = _meant(section, BranchConfig, there) or nearest(section, [*BranchConfig.model_fields, *ALIASES])
        raise ConfigError(f"unknown key {shortened(path)!r}; {hint}")
    asked = [k for k in data if label in ("", k)]
    meant = {k for k in asked if data[k][section] is not None}
    if not rest and (label or not meant):
        meant = set(asked)
    if not meant:
        raise ConfigError(f"--set {shortened(path)}: no selected branch has a stage {section!r}")
    for name in meant:
        _set(data[name], path, text)
    return meant


def _set(node: dict[str, Any], path: str, text: str) -> None:
    *parents, leaf = path.split(".")
    model: type = BranchConfig
    for part in parents:
        model = _submodel(model, part)
        if node.get(part) is None:  # a section of options left at their defaults
            node[part] = {}
        node = node[part]
        if not isinstance(node, dict):
            raise ConfigError(f"--set {shortened(path)}: {part} was set to a value before, which has no fields")
    if leaf not in (known := _fields(model)):
        raise ConfigError(
            f"unknown key {shortened(path)!r}; {_meant(leaf, model, known) or nearest(leaf, list(known))}"
        )
    try:
        node[leaf] = parse_value(text, known[leaf])
    except ValueError as error:
        raise ConfigError(f"--set {shortened(path)}={shortened(text)}: {error}") from error


def _meant(leaf: str, model: type, sections: typing.Iterable[str]) -> str:
    """A hint for a name that stands further down, in one of the `sections` of `model`; "" if it stands in none."""
    for name in sections:
        with contextlib.suppress(ConfigError):
            if leaf in _fields(_submodel(model, name)):
                return f"did you mean {name + '.' + leaf!r}?"
    return ""


def _submodel(model: type, part: str) -> type:
    if part not in (known := _fields(model)):
        raise ConfigError(f"unknown key {shortened(part)!r}; {nearest(part, list(known))}")
    for candidate in (known[part], *typing.get_args(known[part])):
        if isinstance(candidate, type) and _fields(candidate):
            return candidate
    raise ConfigError(f"{shortened(part)!r} is a value, it has no fields below it")


def _fields(model: type) -> dict[str, Any]:
    """The fields of a section and their types: of a pydantic model or of a method's options; empty for a value."""
    if issubclass(model, BaseModel):
        return {name: field.annotation for name, field in model.model_fields.items()}
    return typing.get_type_hints(model) if dataclasses.is_dataclass(model) else {}


_PLAINLY = {
    "extra_forbidden": "unknown key",
    "string_too_short": "needs a value",
    "tuple_type": "write a list, [a, b]",
    "model_type": "a section: set one of its fields, section.field=value",
    "dataclass_type": "a section: set one of its fields, section.field=value",
}
"""What people type for the types that pydantic names, by the kind of its error."""


def explain(error: ValidationError) -> str:
    """A pydantic error as where, what and what was given; the first problems, and how many more there are."""
    lines: list[str] = []
    for item in error.errors():
        where = ".".join(shortened(str(part)) for part in item["loc"]) or "configuration"
        given = "" if isinstance(item["input"], dict | BaseModel) else f" (given: {shortened(repr(item['input']))})"
        message = item["msg"].removeprefix("Value error, ")
        message = _PLAINLY.get(item["type"], message)
        lines.append(f"{where}: {message}{given}")
    shown = lines[:1]
    while len(shown) < len(lines) and len("; ".join([*shown, lines[len(shown)]])) < LONGEST_MESSAGE - 20:
        shown.append(lines[len(shown)])
    more = len(lines) - len(shown)
    return "; ".join(shown) + (f"; and {more} more" if more else "")
