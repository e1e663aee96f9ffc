"""Configuration of the evaluate stage; importing it costs nothing of lighteval."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from tasks.data.benchmarks import TaskKind
from tasks.runtime.stage import StageConfig

UNSAMPLED: Mapping[str, Any] = {"temperature": 0.0, "top_p": 1.0, "max_new_tokens": 1, "enable_thinking": None}
"""Settings where given continuations are scored; they have no effect, and so must not enter a key."""


class EvaluateConfig(StageConfig):
    """What to sample and how; the defaults are the paper's."""

    name: str = Field("problems", pattern=r"^[A-Za-z0-9_.-]+$", description="name of the data set in tables")
    kind: TaskKind = Field("math", description="how problems are asked and answers scored")
    engine: Literal["transformers", "vllm"] = "transformers"
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    temperature: float = Field(0.6, ge=0, description="0 is greedy decoding")
    top_p: float = Field(0.95, gt=0, le=1)
    max_new_tokens: int = Field(32768, ge=1, description="on top of the prompt")
    seeds: tuple[int, ...] = Field((42, 43, 44), min_length=1)
    num_problems: int | None = Field(None, ge=1, description="a fixed choice of that many problems; all if left out")
    enable_thinking: bool | None = Field(
        None, description="Qwen3's thinking switch; the template's default if left out"
    )
    prompt_suffix: str = Field("", description="appended to every problem, e.g. the paper's for mathematics")
    unsafe_code: bool = Field(
        False, description="run model-written programs without a sandbox, with your own rights, where there is none"
    )
    batch_size: int = Field(256, ge=1, description="most sequences decoded together")
    tensor_parallel: int = Field(1, ge=1, description="devices over which vLLM splits each layer")
    data_parallel: int = Field(1, ge=1, description="engines that share the problems, each on devices of its own")
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1, description="share of a GPU for vLLM's weights and cache")
    stall_seconds: float = Field(600, gt=0, description="an engine without a new token for so long is reported")
    stall_limit_seconds: float = Field(3600, gt=0, description="and after so long the stage fails, keeping what it has")

    unkeyed_fields: ClassVar[tuple[str, ...]] = ("stall_seconds", "stall_limit_seconds")

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"seeds {seeds} repeat: each seed is one sample of every problem, so name each once")
        return seeds

    @model_validator(mode="after")
    def _nothing_sampled_for_likelihoods(self) -> EvaluateConfig:
        sampled = len(self.seeds) > 1 or any(getattr(self, name) != value for name, value in UNSAMPLED.items())
        if self.kind == "loglikelihood" and sampled:
            settings = ", ".join(f"{name}={value}" for name, value in UNSAMPLED.items())
            raise ValueError(f"kind=loglikelihood samples nothing: set {settings} and one seed")
        return self

    @model_validator(mode="after")
    def _parallel_in_vllm_only(self) -> EvaluateConfig:
        if self.tensor_parallel > 1 and self.engine != "vllm":
            raise ValueError(f"tensor_parallel is {self.tensor_parallel}, which takes vLLM: set engine='vllm' too")
        return self

    @model_validator(mode="after")
    def _report_before_limit(self) -> EvaluateConfig:
        if self.stall_limit_seconds < self.stall_seconds:
            raise ValueError(
                f"stall_limit_seconds ({self.stall_limit_seconds:g}) is below stall_seconds ({self.stall_seconds:g}): "
                "a stall is reported before it ends the stage"
            )
        return self
