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
from tasks.training.selection import LAST_STATE, Measure, Selection
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


def read_held_out(data: Path, tokenizer: PreTrainedTokenizerBase, config: TraceConfig) -> list[Example]:
    """The examples of `validation_data`."""
    try:
        return read_examples(data, tokenizer, config)[0]
    except StageError as error:
        raise StageError(f"validation_data: {error}") from error


def check_validation(config: StudentConfig, data: Path | None) -> None:
    """StageError where the configuration chooses by data that is not there."""
    if config.needs_validation and data is None:
        raise StageError(
            "keep=best and patience choose by held-out data, and there is none: give validation_data, or set "
            "keep=last and patience=null"
        )


def train_student(
    model: PreTrainedModel,
    objective: nn.Module,
    source: BatchSource,
    config: StudentConfig,
    context: Context,
    student: Path,
    measure: Measure | None = None,
) -> tuple[list[Row], Metrics]:
    """Train `model`, which is inside `objective`, and write it as a checkpoint with its training log.

    With a held-out `measure` the state written is the one that the configuration chooses by it. Returns the log and the
    record's figures.
    """
    selection = LAST_STATE if measure is None else Selection(measure, config, context.scratch)
    rows = train(
        objective,
        source,
        config,
        student_optimizers(objective, config),
        scratch=context.scratch,
        device=context.device,
        progress=context.progress,
        selection=selection,
    )
    save_student(model, student, context.output)
    write_log(rows, context.output / LOG_FILE)
    losses = [row["loss"] for row in rows if "loss" in row]  # none where the first step diverged
    trained = {"first_loss": losses[0], "final_loss": losses[-1]} if losses else {}
    return rows, {**selection.facts(rows), **trained}


def write_log(rows: Iterable[Row], path: Path) -> None:
    """One JSON object per line: the figures of a step, not its samples."""
    figures = ({name: value for name, value in row.items() if name != "samples"} for row in rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in figures))
