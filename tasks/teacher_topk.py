"""teacher_topk: one pass of the full-precision teacher over a dataset, whose top log-probabilities many branches share.

The KL to it is that over the K cached entries and "any other", a lower bound of the full one (`losses.kl_top_k`).
"""

from __future__ import annotations

from pathlib import Path

from tasks.runtime.stage import Context, Metrics, stage
from tasks.training.config import TeacherTopKConfig

__all__ = ["TeacherTopKConfig", "teacher_topk"]


@stage(
    kind="teacher_topk",
    reads={"teacher": "base", "data": "train_data"},
    gives=("teacher_topk",),
    packages=lambda config: ("torch", "transformers"),
)
def teacher_topk(config: TeacherTopKConfig, context: Context, *, teacher: Path, data: Path) -> Metrics:
    """Write the teacher's log-probabilities shard by shard; a killed stage goes on after its last whole shard."""
    from tasks.training.teacher import write_top_k

    return write_top_k(config, context, teacher, data)
