"""BranchConfig: one path through the workflow.  Its sections, in their order, are the stages and the data they read.

A section is a stage's configuration; what the stage reads and gives is said where it is declared.  So a new stage is
one file in tasks/, one field here, and a recipe that sets it.
"""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import model_validator

from tasks.base_model import BaseModelConfig
from tasks.calibrate import CalibrateConfig
from tasks.data.benchmarks import BENCHMARKS, BenchmarkName
from tasks.dataset import DatasetConfig
from tasks.evaluate import EvaluateConfig
from tasks.grpo_train import GRPOTrainConfig
from tasks.kd_train import KDTrainConfig
from tasks.pretrain import PretrainConfig
from tasks.ptq_init import PTQInitConfig
from tasks.runtime.bounds import Named
from tasks.runtime.stage import Stage, StageConfig, stage_of
from tasks.sft_train import SFTTrainConfig
from tasks.teacher_topk import TeacherTopKConfig
from tasks.training.config import StudentConfig

STARTS = ("base_model", "pretrain", "checkpoint")


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
    validation_data: DatasetConfig | None = None
    """Held out: training stages measure themselves on it, and choose by it which state they give."""
    teacher_topk: TeacherTopKConfig | None = None
    sft_train: SFTTrainConfig | None = None
    kd_train: KDTrainConfig | None = None
    rl_data: DatasetConfig | None = None
    grpo_train: GRPOTrainConfig | None = None
    test_data: DatasetConfig | None = None
    evaluate: EvaluateConfig | None = None
    """On test_data, where there is any; its sampling and engine hold for the benchmarks too."""
    benchmarks: tuple[BenchmarkName, ...] = ()
    benchmark_data: Named | None = None
    """A local folder with copies of the benchmarks; the hub if left out."""

    def sections(self) -> Iterator[tuple[str, Stage, StageConfig]]:
        """(name, stage, configuration) of what is to run, in the order of the data flow."""
        for name in type(self).model_fields:
            config = getattr(self, name)
            if isinstance(config, StageConfig):
                yield name, stage_of(type(config)), config

    @model_validator(mode="after")
    def _one_start(self) -> BranchConfig:
        if sum(getattr(self, start) is not None for start in STARTS) != 1:
            raise ValueError(f"give exactly one of {', '.join(STARTS[:-1])} and {STARTS[-1]}")
        return self

    @model_validator(mode="after")
    def _nothing_missing(self) -> BranchConfig:
        """Every required input of every stage is given by a section before it."""
        given = {"base", "model"}
        for name, stage, _ in self.sections():
            for input_name, slot in stage.reads.items():
                if input_name in stage.required and slot not in given and not (name == "evaluate" and self.benchmarks):
                    hint = "; or name benchmarks" if name == "evaluate" else ""
                    raise ValueError(f"{_giver(slot)} is missing: {name} reads it{hint}")
            given |= {name, *stage.gives}
        return self

    @model_validator(mode="after")
    def _choice_has_data(self) -> BranchConfig:
        for name, _, config in self.sections():
            if isinstance(config, StudentConfig) and config.needs_validation and self.validation_data is None:
                raise ValueError(
                    f"validation_data is missing: {name} chooses by it; give it, or set {name}.keep=last and "
                    f"{name}.patience=null"
                )
        return self

    @model_validator(mode="after")
    def _benchmarks_can_be_sampled(self) -> BranchConfig:
        """With evaluate's settings, which for given continuations are one token, greedily."""
        sampled = [name for name in self.benchmarks if BENCHMARKS[name].kind != "loglikelihood"]
        if sampled and self.evaluate is not None and self.evaluate.kind == "loglikelihood":
            raise ValueError(
                f"benchmark {sampled[0]} is sampled with evaluate's settings, and evaluate.kind=loglikelihood samples "
                "nothing: name it in a branch whose evaluate does"
            )
        return self

    @model_validator(mode="after")
    def _benchmarks_are_evaluated_once(self) -> BranchConfig:
        if self.benchmarks and self.evaluate is None:
            raise ValueError("evaluate is missing: the benchmarks are sampled with its settings")
        if len(set(self.benchmarks)) < len(self.benchmarks):
            raise ValueError(f"benchmarks {', '.join(self.benchmarks)} repeat: name each once")
        if self.evaluate is not None and self.test_data is not None and self.evaluate.name in self.benchmarks:
            raise ValueError(f"evaluate.name {self.evaluate.name!r} is also a benchmark's: give test_data another name")
        return self


def _config_type(section: str) -> type[StageConfig] | None:
    """The configuration class of a section; None for a field that is no section."""
    annotation = BranchConfig.model_fields[section].annotation
    candidates = [annotation, *getattr(annotation, "__args__", ())]
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, StageConfig)), None)


SECTIONS: dict[str, Stage] = {
    name: stage_of(config_type) for name in BranchConfig.model_fields if (config_type := _config_type(name)) is not None
}
"""The stage of each section, in the order of the data flow."""
STAGES: dict[str, Stage] = {stage.name: stage for stage in SECTIONS.values()}


def _giver(slot: str) -> str:
    """The first section that gives a slot."""
    return next((name for name, stage in SECTIONS.items() if slot in (name, *stage.gives)), slot)
