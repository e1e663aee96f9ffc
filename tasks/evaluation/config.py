"""Configuration of an evaluation; importing it costs nothing of lighteval or torch."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from tasks.data.benchmarks import TaskKind
from tasks.runtime.bounds import Count, Seed
from tasks.runtime.stage import StageConfig
from tasks.sampling.config import GenerationConfig

UNSAMPLED: dict[str, Any] = {"temperature": 0.0, "top_p": 1.0, "max_new_tokens": 1, "enable_thinking": None}
"""Of `generation`, where given continuations are scored: settings that have no effect, and so must not enter a key."""


class EvaluateConfig(StageConfig):
    """What to sample and how; the defaults are the paper's."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")] = "problems"
    """Of the data set, in tables."""
    kind: TaskKind = "math"
    """How problems are asked and answers scored."""
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (42, 43, 44)
    num_problems: Count | None = None
    """A fixed choice of that many problems; all if left out."""
    unsafe_code: bool = False
    """Run model-written programs without a sandbox, with your own rights, where there is none."""
    generation: GenerationConfig = GenerationConfig()

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"seeds {seeds} repeat: each seed is one sample of every problem, so name each once")
        return seeds

    @model_validator(mode="after")
    def _nothing_sampled_for_likelihoods(self) -> EvaluateConfig:
        asked = self.generation
        sampled = len(self.seeds) > 1 or any(getattr(asked, name) != value for name, value in UNSAMPLED.items())
        if self.kind == "loglikelihood" and sampled:
            settings = ", ".join(f"generation.{name}={value}" for name, value in UNSAMPLED.items())
            raise ValueError(f"kind=loglikelihood samples nothing: set {settings} and one seed")
        return self
