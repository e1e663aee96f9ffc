"""Configurations that the training stages share; importing them loads no torch."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from quant.grids.scheme import ScaleMode
from tasks.runtime.bounds import Count, NonNegative, Positive, Rate, Seed, Share, Whole
from tasks.runtime.stage import StageConfig

LOG_FILE = "training_log.jsonl"

Direction = Literal["forward", "reverse"]
"""Of the KL divergence: of the student from the teacher, or of the teacher from the student."""
Precision = Literal["bfloat16", "float32"]
Attention = Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3"]
Beta = Annotated[float, Field(ge=0, lt=1)]


class LoopConfig(StageConfig):
    """What every training stage has.  Lengths of time are optimizer steps, sizes are sequences."""

    unkeyed_fields: ClassVar[tuple[str, ...]] = ("checkpoint_every",)

    steps: Count
    learning_rate: Rate
    warmup_steps: Whole = 0
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    weight_decay: NonNegative = 0.0
    max_grad_norm: Positive = 1.0
    batch_size: Count = 32
    micro_batch_size: Count = 8
    schedule: Literal["cosine", "constant"] = "cosine"
    final_lr_ratio: Share = 0.0
    checkpoint_every: Count = 100
    mixed_precision: Literal["no", "bf16"] = "no"
    seed: Seed = 0

    @model_validator(mode="after")
    def _warmup_fits(self) -> Self:
        if self.warmup_steps > self.steps:
            raise ValueError(f"warmup_steps={self.warmup_steps} exceeds steps={self.steps}: lower warmup_steps too")
        return self


class StudentConfig(LoopConfig):
    """How the student is trained, whatever the objective: fp32 latents, computing in `mixed_precision`."""

    scale_mode: ScaleMode = "frozen"
    """frozen: the PTQ grid stays (the default for GPTQ starts); recomputed: min-max of the latent weights at every
    step (for RTN and FlatQuant starts); learned: trained at `scale_learning_rate`."""
    scale_learning_rate: Rate = 1e-5
    transform_learning_rate: Rate = 5e-5
    """Of transforms and their scales, where a checkpoint has learned ones (FlatQuant; Table 6, W4A4)."""
    clip_learning_rate: Rate = 5e-4
    """Of clipping factors, likewise."""
    train_embeddings: bool = False
    """Also train what is not quantized: embeddings, head, norms and biases."""
    gradient_checkpointing: bool = False
    attention: Attention = "sdpa"
    """transformers' attention implementation; "eager" is faster in bf16 on a CPU."""


class TraceConfig(StageConfig):
    """How (prompt, response) rows become tokens; the teacher's cache and the training on it must agree in this."""

    max_length: Annotated[Count, Field(gt=1)] = 8192
    overlong: Literal["drop", "truncate"] = "drop"
    """What becomes of a row with more than `max_length` tokens; both are counted."""
    prompt_suffix: str = ""
    enable_thinking: bool | None = None
