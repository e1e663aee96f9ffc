"""kd_train: distil the full-precision model into its quantized student (paper, section 4.1, step 2).

The defaults are those of Table 6 for a GPTQ start; for an RTN start it has learning_rate=2e-5.
Departure: the paper names neither the direction of the KL, nor a temperature, nor whether prompts count.  Defaults:
forward KL, temperature 1, response tokens only (all tokens of plain text), as in NVIDIA's Model-Optimizer
(modelopt/torch/distill/plugins/huggingface.py).
Departure: Table 6 leaves open how its global batch of 32 is cut; its 4 accumulation steps are read as micro-batches
of 8.
"""

from __future__ import annotations

from pathlib import Path

from tasks.runtime.stage import Context, Metrics, stage
from tasks.training.config import LOG_FILE, KDTrainConfig

__all__ = ["KDTrainConfig", "kd_train"]


@stage(
    kind="checkpoint",
    reads={
        "student": "student",
        "teacher": "base",
        "data": "train_data",
        "teacher_topk": "teacher_topk",
        "validation": "validation_data",
    },
    gives=("student", "model"),
    log=LOG_FILE,
    packages=lambda config: ("torch", "transformers"),
)
def kd_train(
    config: KDTrainConfig,
    context: Context,
    *,
    student: Path,
    teacher: Path,
    data: Path,
    teacher_topk: Path | None = None,
    validation: Path | None = None,
) -> Metrics:
    """Minimise the KL divergence to `teacher` on `data`, or to its cached log-probabilities `teacher_topk`.

    The divergence on `validation`, from the teacher itself, is watched.
    """
    from tasks.training.supervised import train_kd

    return train_kd(config, context, student, teacher, data, teacher_topk, validation)
