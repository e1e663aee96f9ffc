"""The stage that makes the bundled tiny reasoning model from nothing, in minutes on a CPU.

Departure: the paper starts from published reasoning models; this one stands in for them where none can be downloaded.

Arithmetic drills are what makes it trainable in minutes: without them the result digits stay at chance long after
format and copying are learned. Their share of a batch starts high and falls linearly.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from tasks.runtime.bounds import Count, PositiveShare, Rate, Share
from tasks.runtime.stage import Context, Metrics, StageConfig, stage
from tasks.training.config import LOG_FILE, LoopConfig

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


@stage(kind="checkpoint", gives=("base", "model"), log=LOG_FILE, packages=lambda config: ("torch", "transformers"))
def pretrain(config: PretrainConfig, context: Context) -> Metrics:
    """Train the model on generated problems, drills and stories, and write it as a bf16 Hugging Face folder."""
    from tasks.training.pretraining import train_from_nothing

    return train_from_nothing(config, context)
