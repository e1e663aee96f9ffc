"""Configuration of the evaluate stage; importing it costs nothing of lighteval."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from tasks.stage import StageConfig

# For mathematics, as the harness that the paper builds on words it (github.com/ruikangliu/Quantized-Reasoning-Models).
MATH_SUFFIX = "\n\nPlease reason step by step, and put your final answer within \\boxed{}."


class EvaluateConfig(StageConfig):
    """What to sample and how; the defaults are the paper's."""

    name: str = Field("problems", pattern=r"^[A-Za-z0-9_.-]+$", description="name of the data set in tables")
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
    batch_size: int = Field(256, ge=1, description="most sequences decoded together")

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"seeds {seeds} repeat: each seed is one sample of every problem, so name each once")
        return seeds
