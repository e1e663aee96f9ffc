"""The teacher's pass over a dataset whose largest log-probabilities `teacher_topk` keeps."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from artifacts import scratch as midstage
from tasks.checkpoints.models import load_model, load_tokenizer
from tasks.runtime.stage import Context, Metrics, StageError
from tasks.training.config import TeacherTopKConfig
from tasks.training.student_training import read_examples
from tasks.training.topk import shard_name, write_index, write_shard


def write_top_k(config: TeacherTopKConfig, context: Context, teacher: Path, data: Path) -> Metrics:
    """The body of `teacher_topk`; StageError where the vocabulary has fewer than k entries."""
    examples, counts = read_examples(data, load_tokenizer(teacher), config)
    model = load_model(teacher, getattr(torch, config.dtype), context.device, config.attention)
    if config.k > model.config.vocab_size:
        raise StageError(f"k={config.k} exceeds the vocabulary of {model.config.vocab_size}: lower k")
    size = config.rows_per_shard
    shards = [examples[i : i + size] for i in range(0, len(examples), size)]
    for number, shard in enumerate(shards):
        folder, name = context.scratch / f"shard-{number:05d}", shard_name(number)
        if not midstage.is_sound(folder):
            with midstage.writing(folder) as inside:
                write_shard(model, shard, inside / name, config.k, config.temperature, config.micro_batch_size)
        shutil.copyfile(folder / name, context.output / name)
        context.progress(number + 1, len(shards), unit="shard")
    write_index(shards, context.output, config.k, config.temperature)
    return {"num_tokens": sum(example.num_targets for example in examples), **counts}
