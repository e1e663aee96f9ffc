"""Configurations that the training stages share; importing them loads no torch."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from quant.grids.scheme import ScaleMode
from tasks.runtime.bounds import Count, NonNegative, Positive, PositiveShare, Rate, Seed, Share, Whole
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

    @property
    def resumable_every(self) -> int:
        """Training can go on from a state saved after a multiple of so many steps."""
        return 1

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
    keep: Literal["best", "last"] | None = None
    """Which state the stage gives: the one with the best held-out measure, the start included (the default where there
    is validation_data), or the last (the default where there is none)."""
    validate_every: Count = 100
    """Steps between held-out measures on validation_data; start and end are measured too."""
    patience: Count | None = None
    """End after so many measures in a row without a better one."""

    @property
    def needs_validation(self) -> bool:
        """Whether it says something that means nothing without validation_data."""
        return self.keep == "best" or self.patience is not None


class TraceConfig(StageConfig):
    """How (prompt, response) rows become tokens; the teacher's cache and the training on it must agree in this."""

    max_length: Annotated[Count, Field(gt=1)] = 8192
    overlong: Literal["drop", "truncate"] = "drop"
    """What becomes of a row with more than `max_length` tokens; both are counted."""
    prompt_suffix: str = ""
    enable_thinking: bool | None = None


class SFTTrainConfig(StudentConfig, TraceConfig):
    steps: Count = 6000
    learning_rate: Rate = 1e-6
    warmup_steps: Whole = 180


class KDTrainConfig(StudentConfig, TraceConfig):
    steps: Count = 6000
    learning_rate: Rate = 1e-6
    warmup_steps: Whole = 180
    direction: Direction = "forward"
    temperature: Positive = 1.0
    teacher_dtype: Precision = "bfloat16"
    """Precision of the teacher's weights and forward pass; bf16 is the model that the paper calls full precision."""


class TeacherTopKConfig(TraceConfig):
    k: Count = 64
    temperature: Positive = 1.0
    dtype: Precision = "bfloat16"
    attention: Attention = "sdpa"
    micro_batch_size: Count = 8
    rows_per_shard: Count = 1024


Size = Annotated[Count, Field(le=65536)]
"""Of a dimension of the model."""


class PretrainConfig(StageConfig):
    hidden_size: Size = 256
    intermediate_size: Size = 768
    num_layers: Size = 4
    num_heads: Size = 4
    num_key_value_heads: Size = 2
    head_dim: Size = 64
    max_position_embeddings: Count = 512
    adam_learning_rate: Rate = 3e-3
    first_drill_share: Share = 0.6
    last_drill_share: Share = 0.15
    drill_ramp: PositiveShare = 0.6
    """Fraction of the steps over which the drills' share falls from first to last."""
    story_share: Share = 0.03
    loop: LoopConfig = LoopConfig(
        steps=1300,
        learning_rate=0.02,
        warmup_steps=40,
        weight_decay=0.1,
        batch_size=32,
        micro_batch_size=16,
        mixed_precision="bf16",
    )
