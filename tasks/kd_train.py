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
from typing import Literal

import torch
from pydantic import Field

from tasks.checkpoints.models import load_model, load_student, load_tokenizer
from tasks.runtime.stage import Context, Metrics, StageError, stage
from tasks.training.batches import TokenBatches
from tasks.training.losses import Direction
from tasks.training.objectives import KDObjective
from tasks.training.student import StudentConfig, select_trainable
from tasks.training.student_training import TraceConfig, read_examples, train_student
from tasks.training.topk import TopKCache


class KDTrainConfig(StudentConfig, TraceConfig):
    steps: int = 6000
    learning_rate: float = 1e-6
    warmup_steps: int = 180
    batch_size: int = 32
    micro_batch_size: int = 8
    direction: Direction = "forward"
    temperature: float = Field(default=1.0, gt=0)
    teacher_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of the teacher's weights and forward pass; bf16 is the model that the paper calls full precision."""


@stage(
    kind="checkpoint",
    reads={"student": "model", "teacher": "base", "data": "train_data", "teacher_topk": "teacher_topk"},
    gives="model",
    log="training_log.jsonl",
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
) -> Metrics:
    """Minimise the KL divergence to `teacher` on `data`, or to its cached log-probabilities `teacher_topk`."""
    examples, counts = read_examples(data, load_tokenizer(student), config)
    model = load_student(student, config.scale_mode, context.device, config.attention)
    select_trainable(model, config)
    cache = None if teacher_topk is None else TopKCache(teacher_topk, examples, config.temperature)
    full = None
    if cache is None:
        full = load_model(teacher, getattr(torch, config.teacher_dtype), context.device, config.attention)
        full.requires_grad_(False)
        if full.config.vocab_size != model.config.vocab_size:
            raise StageError(
                f"teacher and student differ in vocabulary size ({full.config.vocab_size} and "
                f"{model.config.vocab_size}): distil from the model that the student was quantized from"
            )
    objective = KDObjective(model, full, config.direction, config.temperature)
    metrics = train_student(model, objective, TokenBatches(examples, config, cache), config, context, student)
    return {**metrics, **counts}
