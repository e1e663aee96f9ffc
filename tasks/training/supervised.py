"""Training on given traces: SFT on their tokens, KD on the teacher's distribution over them."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from tasks.checkpoints.models import load_model, load_student, load_tokenizer
from tasks.runtime.stage import Context, Metrics, StageError
from tasks.training.batches import Example, TokenBatches
from tasks.training.config import KDTrainConfig, SFTTrainConfig
from tasks.training.objectives import KDObjective, SFTObjective
from tasks.training.student import select_trainable
from tasks.training.student_training import check_validation, read_examples, read_held_out, train_student
from tasks.training.topk import TopKCache
from tasks.training.validation import cross_entropy_measure, divergence_measure


def train_sft(config: SFTTrainConfig, context: Context, student: Path, data: Path, validation: Path | None) -> Metrics:
    """The body of `sft_train`."""
    model, examples, counts, held_out = _read(config, context, student, data, validation)
    measure = None if held_out is None else cross_entropy_measure(model, held_out, config)
    source = TokenBatches(examples, config)
    _, metrics = train_student(model, SFTObjective(model), source, config, context, student, measure)
    return {**metrics, **counts}


def train_kd(
    config: KDTrainConfig,
    context: Context,
    student: Path,
    teacher: Path,
    data: Path,
    teacher_topk: Path | None,
    validation: Path | None,
) -> Metrics:
    """The body of `kd_train`; StageError where teacher and student have other vocabularies.

    Held-out data is measured against the teacher itself, cached or not.
    """
    model, examples, counts, held_out = _read(config, context, student, data, validation)
    cache = None if teacher_topk is None else TopKCache(teacher_topk, examples, config.temperature)
    full = None if cache is not None and held_out is None else _load_teacher(teacher, model, config, context.device)
    measure = None
    if held_out is not None and full is not None:
        measure = divergence_measure(model, full, held_out, config)
    objective = KDObjective(model, full if cache is None else None, config.direction, config.temperature)
    source = TokenBatches(examples, config, cache)
    _, metrics = train_student(model, objective, source, config, context, student, measure)
    return {**metrics, **counts}


def _read(
    config: SFTTrainConfig | KDTrainConfig, context: Context, student: Path, data: Path, validation: Path | None
) -> tuple[PreTrainedModel, list[Example], dict[str, int], list[Example] | None]:
    """The student ready to train, the examples and how many were kept, and the held-out ones."""
    check_validation(config, validation)
    tokenizer = load_tokenizer(student)
    examples, counts = read_examples(data, tokenizer, config)
    held_out = None if validation is None else read_held_out(validation, tokenizer, config)
    model = load_student(student, config.scale_mode, context.device, config.attention)
    select_trainable(model, config)
    return model, examples, counts, held_out


def _load_teacher(teacher: Path, student: PreTrainedModel, config: KDTrainConfig, device: str) -> PreTrainedModel:
    full = load_model(teacher, getattr(torch, config.teacher_dtype), device, config.attention)
    full.requires_grad_(False)
    if full.config.vocab_size != student.config.vocab_size:
        raise StageError(
            f"teacher and student differ in vocabulary size ({full.config.vocab_size} and "
            f"{student.config.vocab_size}): distil from the model that the student was quantized from"
        )
    return full
