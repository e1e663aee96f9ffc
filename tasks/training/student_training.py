"""What the stages that train a student share: reading a dataset artifact, running the loop, writing the checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow.parquet as pq
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tasks.checkpoints.models import save_student
from tasks.data.prompts import encode_example
from tasks.runtime.stage import Context, Metrics, StageError
from tasks.training.batches import Example, tokenize
from tasks.training.config import LOG_FILE, StudentConfig, TraceConfig
from tasks.training.loop import BatchSource, Row, train
from tasks.training.student import student_optimizers


def read_rows(data: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a dataset artifact, these columns only."""
    return pq.read_table(data / "data.parquet", columns=list(columns)).to_pylist()


def read_examples(
    data: Path, tokenizer: PreTrainedTokenizerBase, config: TraceConfig
) -> tuple[list[Example], dict[str, int]]:
    """The tokenized rows of a dataset artifact, and how many were kept, dropped and cut off.

    Raises StageError for rows without a response: from them a student would learn to end its turn at once.
    """

    def encode(prompt: str, response: str) -> tuple[list[int], int]:
        return encode_example(tokenizer, prompt, response, config.enable_thinking, config.prompt_suffix)

    rows = [(row["prompt"], row["response"]) for row in read_rows(data, ("prompt", "response"))]
    if bare := sum(not response.strip() for _, response in rows):
        raise StageError(
            f"{bare} of {len(rows)} examples have no response to train on: set response_field for the data set"
        )
    return tokenize(rows, encode, config.max_length, config.overlong)


def train_student(
    model: PreTrainedModel,
    objective: nn.Module,
    source: BatchSource,
    config: StudentConfig,
    context: Context,
    student: Path,
) -> list[Row]:
    """Train `model`, which is inside `objective`, and write it as a checkpoint with its training log."""
    rows = train(
        objective,
        source,
        config,
        student_optimizers(objective, config),
        scratch=context.scratch,
        device=context.device,
        progress=context.progress,
    )
    save_student(model, student, context.output)
    write_log(rows, context.output / LOG_FILE)
    return rows


def losses(rows: Sequence[Row]) -> Metrics:
    """The record's figures of a training."""
    return {"first_loss": rows[0]["loss"], "final_loss": rows[-1]["loss"]}


def write_log(rows: Iterable[Row], path: Path) -> None:
    """One JSON object per line: the figures of a step, not its samples."""
    figures = ({name: value for name, value in row.items() if name != "samples"} for row in rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in figures))
