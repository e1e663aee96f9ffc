"""RunConfig: every stage's configuration in one frozen model; a run is a set of named branches."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Sequence
from typing import Any

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from tasks.base_model import BaseModelConfig
from tasks.calibrate import CalibrateConfig
from tasks.data.benchmarks import BenchmarkName
from tasks.dataset import DatasetConfig
from tasks.evaluate import EvaluateConfig
from tasks.grpo_train import GRPOTrainConfig
from tasks.kd_train import KDTrainConfig
from tasks.pretrain import PretrainConfig
from tasks.ptq_init import PTQInitConfig
from tasks.runtime.stage import StageConfig
from tasks.sft_train import SFTTrainConfig
from tasks.teacher_topk import TeacherTopKConfig

ALIASES = {"model": "base_model.model"}


class ConfigError(ValueError):
    """A configuration the user can mend; the message names the nearest valid choice."""


class BranchConfig(StageConfig):
    """One path through the workflow; a section that is None is skipped.

    The model it starts from is brought in (`base_model`), trained from nothing (`pretrain`), or already in the store
    (`checkpoint`, a digest).
    """

    base_model: BaseModelConfig | None = None
    pretrain: PretrainConfig | None = None
    checkpoint: str | None = None
    calibration_data: DatasetConfig | None = None
    calibrate: CalibrateConfig | None = None
    ptq_init: PTQInitConfig | None = None
    train_data: DatasetConfig | None = None
    teacher_topk: TeacherTopKConfig | None = None
    sft_train: SFTTrainConfig | None = None
    kd_train: KDTrainConfig | None = None
    rl_data: DatasetConfig | None = None
    grpo_train: GRPOTrainConfig | None = None
    test_data: DatasetConfig | None = None
    evaluate: EvaluateConfig | None = None
    """On test_data, where there is any; its sampling and engine hold for the benchmarks too."""
    benchmarks: tuple[BenchmarkName, ...] = ()
    benchmark_data: str | None = None
    """A local folder with copies of the benchmarks; the hub if left out."""

    @model_validator(mode="after")
    def _complete(self) -> BranchConfig:
        starts = (self.base_model, self.pretrain, self.checkpoint)
        if sum(start is not None for start in starts) != 1:
            raise ValueError("give exactly one of base_model, pretrain and checkpoint")
        trained = self.sft_train or self.kd_train or self.grpo_train
        needs = [
            (trained, "ptq_init", "training adapts a quantized model"),
            (self.sft_train or self.kd_train, "train_data", "SFT and KD read it"),
            (self.grpo_train, "rl_data", "GRPO draws its prompts from it"),
            (self.calibrate, "calibration_data", "calibrate reads it"),
            (self.benchmarks, "evaluate", "the benchmarks are sampled with its settings"),
        ]
        for wanted, section, reason in needs:
            if wanted and getattr(self, section) is None:
                raise ValueError(f"{section} is missing: {reason}")
        if self.evaluate is not None and self.test_data is None and not self.benchmarks:
            raise ValueError("test_data is missing: evaluate reads it; or name benchmarks")
        if len(set(self.benchmarks)) < len(self.benchmarks):
            raise ValueError(f"benchmarks {', '.join(self.benchmarks)} repeat: name each once")
        if self.evaluate is not None and self.test_data is not None and self.evaluate.name in self.benchmarks:
            raise ValueError(f"evaluate.name {self.evaluate.name!r} is also a benchmark's: give test_data another name")
        return self


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
        """The run with only the branches whose label contains one of the patterns (case-insensitive)."""
        if not patterns:
            return self
        kept = {k: v for k, v in self.branches.items() if any(p.lower() in k.lower() for p in patterns)}
        if not kept:
            raise ConfigError(f"no branch matches {list(patterns)}; the branches are: {', '.join(self.branches)}")
        return self.with_branches(kept)

    def with_branches(self, branches: dict[str, BranchConfig]) -> RunConfig:
        """The run with other branches; comparisons with branches that are gone are dropped."""
        reference = self.reference if self.reference in branches else None
        comparisons = tuple(pair for pair in self.comparisons if set(pair) <= set(branches))
        return self.model_copy(update={"branches": branches, "reference": reference, "comparisons": comparisons})


def nearest(name: str, valid: Sequence[str]) -> str:
    """A hint for a mistyped name: the nearest valid one, and all of them."""
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}valid: {', '.join(valid)}"


def apply_overrides(run: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """`section.field=value` on every branch that has the section; `label:section.field=value` on one branch.

    Values are YAML, so `3`, `1e-5`, `true`, `[42, 43]` and `null` mean what they say; `section=null` skips a stage.
    All are applied before the result is validated, so their order does not matter.
    Raises ConfigError for unknown keys and values that do not fit, naming the nearest valid key.
    """
    data = {label: branch.model_dump() for label, branch in run.branches.items()}
    touched = set()
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            raise ConfigError(f"--set {override!r}: write section.field=value, for example kd_train.steps=20")
        label, _, path = key.rpartition(":")
        touched |= _override(data, label, ALIASES.get(path, path), _parse(text))
    try:
        return run.with_branches(
            {k: BranchConfig.model_validate(data[k]) if k in touched else v for k, v in run.branches.items()}
        )
    except ValidationError as error:
        raise ConfigError(explain(error)) from error


def _parse(text: str) -> Any:
    value = yaml.safe_load(text)
    # YAML 1.1 reads 1e-5 as a string; people who type it mean the number.
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _override(data: dict[str, dict[str, Any]], label: str, path: str, value: Any) -> set[str]:
    """Set one value in the branches it is meant for; returns their labels."""
    if label and label not in data:
        raise ConfigError(f"unknown branch {label!r}; {nearest(label, list(data))}")
    section, _, rest = path.partition(".")
    if section not in BranchConfig.model_fields:
        raise ConfigError(f"unknown key {path!r}; {nearest(section, [*BranchConfig.model_fields, *ALIASES])}")
    meant = {k for k in data if label in ("", k) and (data[k][section] is not None or not rest)}
    if not meant:
        raise ConfigError(f"--set {path}: no selected branch has a stage {section!r}")
    for name in meant:
        _set(data[name], path, value)
    return meant


def _set(node: dict[str, Any], path: str, value: Any) -> None:
    *parents, leaf = path.split(".")
    model: type = BranchConfig
    for part in parents:
        model = _submodel(model, part)
        if node.get(part) is None:  # a section of options left at their defaults
            node[part] = {}
        node = node[part]
    if leaf not in (known := _fields(model)):
        raise ConfigError(f"unknown key {path!r}; {nearest(leaf, list(known))}")
    node[leaf] = value


def _submodel(model: type, part: str) -> type:
    if part not in (known := _fields(model)):
        raise ConfigError(f"unknown key {part!r}; {nearest(part, list(known))}")
    for candidate in (known[part], *typing.get_args(known[part])):
        if isinstance(candidate, type) and _fields(candidate):
            return candidate
    raise ConfigError(f"{part!r} is a value, it has no fields below it")


def _fields(model: type) -> dict[str, Any]:
    """The fields of a section and their types: of a pydantic model or of a method's options; empty for a value."""
    if issubclass(model, BaseModel):
        return {name: field.annotation for name, field in model.model_fields.items()}
    return typing.get_type_hints(model) if dataclasses.is_dataclass(model) else {}


def explain(error: ValidationError) -> str:
    """A pydantic error in one line per problem: where, what, and what was given."""
    lines = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"]) or "configuration"
        given = "" if isinstance(item["input"], dict | BaseModel) else f" (given: {item['input']!r})"
        lines.append(f"{where}: {item['msg']}{given}")
    return "; ".join(lines)
