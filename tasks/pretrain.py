"""The stage that makes the bundled tiny reasoning model from nothing, in minutes on a CPU.

Departure: the paper starts from published reasoning models; this one stands in for them where none can be downloaded.

Arithmetic drills are what makes it trainable in minutes: without them the result digits stay at chance long after
format and copying are learned. Their share of a batch starts high and falls linearly.
"""

from __future__ import annotations

from tasks.runtime.stage import Context, Metrics, stage
from tasks.training.config import LOG_FILE, PretrainConfig

__all__ = ["PretrainConfig", "pretrain"]


@stage(kind="checkpoint", gives=("base", "model"), log=LOG_FILE, packages=lambda config: ("torch", "transformers"))
def pretrain(config: PretrainConfig, context: Context) -> Metrics:
    """Train the model on generated problems, drills and stories, and write it as a bf16 Hugging Face folder."""
    from tasks.training.pretraining import train_from_nothing

    return train_from_nothing(config, context)
