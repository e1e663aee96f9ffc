"""Training on given traces: SFT on their tokens, KD on the teacher's distribution over them."""

from __future__ import annotations

from pathlib import Path

import torch

from tasks.checkpoints.models import load_model, load_student, load_tokenizer
from tasks.runtime.stage import Context, Metrics, StageError
from tasks.training.batches import TokenBatches
from tasks.training.config import KDTrainConfig, SFTTrainConfig
from tasks.training.objectives import KDObjective, SFTObjective
from tasks.training.student import select_trainable
from tasks.training.student_training import losses, read_examples, train_student
from tasks.training.topk import TopKCache


def train_sft(config: SFTTrainConfig, context: Context, student: Path, data: Path) -> Metrics:
    """The body of `sft_train`."""
    examples, counts = read_examples(data, load_tokenizer(student), config)
    model = load_student(student, config.scale_mode, context.device, config.attention)
    select_trainable(model, config)
    rows = train_student(model, SFTObjective(model), TokenBatches(examples, config), config, context, student)
    return {**losses(rows), **counts}


def train_kd(
    config: KDTrainConfig, context: Context, student: Path, teacher: Path, data: Path, teacher_topk: Path | None
) -> Metrics:
    """The body of `kd_train`; StageError where teacher and student have other vocabularies."""
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
    rows = train_student(model, objective, TokenBatches(examples, config, cache), config, context, student)
    return {**losses(rows), **counts}
