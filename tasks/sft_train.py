"""sft_train: train the quantized student on reasoning traces with cross entropy (paper, sections 3.1 and 3.2).

The defaults are those of Table 6 for a GPTQ start; for an RTN start it has learning_rate=2e-5.
Departure: Table 6 leaves open how its global batch of 32 is cut; its 4 accumulation steps are read as micro-batches
of 8.
"""

from __future__ import annotations

from pathlib import Path

from tasks.runtime.stage import Context, Metrics, stage
from tasks.training.config import LOG_FILE, SFTTrainConfig

__all__ = ["SFTTrainConfig", "sft_train"]


@stage(
    kind="checkpoint",
    reads={"student": "student", "data": "train_data", "validation": "validation_data"},
    gives=("student", "model"),
    log=LOG_FILE,
    packages=lambda config: ("torch", "transformers"),
)
def sft_train(
    config: SFTTrainConfig, context: Context, *, student: Path, data: Path, validation: Path | None = None
) -> Metrics:
    """Minimise the cross entropy of the response tokens of `data`; that of `validation` is watched."""
    from tasks.training.supervised import train_sft

    return train_sft(config, context, student, data, validation)
