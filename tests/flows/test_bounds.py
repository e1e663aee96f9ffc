"""Every number of every configuration: what makes no sense is refused when it is typed, not after hours."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from typing import Any

import pytest
from pydantic import BaseModel, TypeAdapter, ValidationError

from flows.branches import BranchConfig
from flows.config import ConfigError, apply_overrides
from flows.recipes import tiny_w2g128
from tasks.training.config import LoopConfig

NEVER = [math.nan, math.inf, -math.inf, 10**30, -(10**30), 1e300, -1, -0.5, True]
"""No number of any configuration may be one of these: none is negative, and none is without a bound."""
ZERO_MEANS_SOMETHING = {
    "warmup_steps", "weight_decay", "final_lr_ratio", "seed", "seeds", "story_share", "first_drill_share",
    "last_drill_share", "beta", "betas", "calibrate.generation.temperature",
    "evaluate.generation.temperature", "num_samples", "min_response_chars", "damping", "max_retries",
}  # fmt: skip
"""Numbers that may be 0.  A new one is added here on purpose."""


def numbers(model: type) -> dict[str, tuple[type, str, Any]]:
    """Path to (class, field, type of its elements) of every numeric field below a configuration class."""
    found: dict[str, tuple[type, str, Any]] = {}
    for name, annotation in _annotations(model).items():
        for part in _parts(annotation):
            if part in (int, float):
                found[name] = (model, name, annotation)
            elif isinstance(part, type) and (issubclass(part, BaseModel) or dataclasses.is_dataclass(part)):
                found |= {f"{name}.{inner}": value for inner, value in numbers(part).items()}
    return found


def _annotations(model: type) -> dict[str, Any]:
    if issubclass(model, BaseModel):
        return typing.get_type_hints(model, include_extras=True)
    return typing.get_type_hints(model, include_extras=True) if dataclasses.is_dataclass(model) else {}


def _unwrapped(annotation: Any) -> Any:
    return (
        _unwrapped(typing.get_args(annotation)[0]) if typing.get_origin(annotation) is typing.Annotated else annotation
    )


def _parts(annotation: Any) -> list[Any]:
    origin = typing.get_origin(annotation)
    if origin is typing.ClassVar:
        return []
    if origin is typing.Annotated:
        return _parts(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType, tuple, list):
        return [part for argument in typing.get_args(annotation) for part in _parts(argument)]
    return [annotation]


ALL = numbers(BranchConfig)
NEEDED: dict[type, dict[str, Any]] = {LoopConfig: {"steps": 1000, "learning_rate": 1e-3}}
"""Fields without a default."""


def is_refused(path: str, value: Any) -> bool:
    """Whether the class of the field refuses it, everything else being as in the class itself."""
    model, name, annotation = ALL[path]
    given = value
    if typing.get_origin(part := _unwrapped(annotation)) is tuple:
        given = (value,) if Ellipsis in typing.get_args(part) else (value, 0.5)
    try:
        TypeAdapter(model).validate_python({**NEEDED.get(model, {}), name: given})
    except ValidationError as error:
        return any(name in item["loc"] or not item["loc"] for item in error.errors())
    return False


def test_the_walk_finds_them() -> None:
    assert len(ALL) > 80
    assert {"kd_train.batch_size", "pretrain.loop.steps", "ptq_init.flatquant.epochs", "evaluate.seeds"} <= set(ALL)


@pytest.mark.parametrize("path", sorted(ALL))
def test_no_number_is_negative_infinite_or_without_a_bound(path: str) -> None:
    values = NEVER if issubclass(ALL[path][0], BaseModel) else NEVER[:-1]  # a dataclass of quant takes true for 1
    accepted = [value for value in values if not is_refused(path, value)]
    assert not accepted, f"{path} accepts {accepted}: give it a type of tasks/runtime/bounds.py"


@pytest.mark.parametrize("path", sorted(ALL))
def test_nothing_trains_measures_or_holds_nothing(path: str) -> None:
    may_be_zero = any(f".{path}".endswith(f".{name}") for name in ZERO_MEANS_SOMETHING)
    assert is_refused(path, 0) != may_be_zero, f"{path}: 0 is {'refused' if may_be_zero else 'accepted'}"


@pytest.mark.parametrize(
    "override",
    [
        "kd_train.batch_size=0", "kd_train.batch_size=-4", "kd_train.micro_batch_size=-1", "kd_train.steps=0",
        "kd_train.learning_rate=-1", "kd_train.learning_rate=nan", "kd_train.learning_rate=.inf",
        "grpo_train.batch_size=0", "kd_train.steps=true", "ptq_init.gptq.damping=.nan", "kd_train.betas=[0.9, 1]",
    ],
)  # fmt: skip
def test_training_that_does_nothing_or_harm_is_refused_before_anything_runs(override: str) -> None:
    with pytest.raises(ConfigError, match=override.partition("=")[0].rpartition(".")[2]):
        apply_overrides(tiny_w2g128(), [override])
