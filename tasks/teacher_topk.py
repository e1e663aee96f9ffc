"""teacher_topk: one pass of the full-precision teacher over a dataset, whose top log-probabilities many branches share.

The KL to it is that over the K cached entries and "any other", a lower bound of the full one (`losses.kl_top_k`).
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field

from tasks.checkpoints.models import load_model, load_tokenizer
from tasks.runtime.stage import Context, Metrics, StageError, stage
from tasks.training.student_training import TraceConfig, read_examples
from tasks.training.topk import shard_name, write_index, write_shard


class TeacherTopKConfig(TraceConfig):
    k: int = Field(default=64, gt=0)
    temperature: float = Field(default=1.0, gt=0)
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    attention: str = "sdpa"
    micro_batch_size: int = Field(default=8, gt=0)
    rows_per_shard: int = Field(default=1024, gt=0)


@stage(
    kind="teacher_topk",
    reads={"teacher": "base", "data": "train_data"},
    gives="teacher_topk",
    packages=lambda config: ("torch", "transformers"),
)
def teacher_topk(config: TeacherTopKConfig, context: Context, *, teacher: Path, data: Path) -> Metrics:
    """Write the teacher's log-probabilities shard by shard; a killed stage goes on after its last whole shard."""
    examples, counts = read_examples(data, load_tokenizer(teacher), config)
    model = load_model(teacher, getattr(torch, config.dtype), context.device, config.attention)
    if config.k > model.config.vocab_size:
        raise StageError(f"k={config.k} exceeds the vocabulary of {model.config.vocab_size}: lower k")
    size = config.rows_per_shard
    shards = [examples[i : i + size] for i in range(0, len(examples), size)]
    for number, shard in enumerate(shards):
        path = context.scratch / shard_name(number)
        if not path.exists():
            write_shard(model, shard, path, config.k, config.temperature, config.micro_batch_size)
        context.progress(number + 1, len(shards), unit="shard")
    for number in range(len(shards)):
        shutil.copyfile(context.scratch / shard_name(number), context.output / shard_name(number))
    write_index(shards, context.output, config.k, config.temperature)
    return {"num_tokens": sum(example.num_targets for example in examples), **counts}
