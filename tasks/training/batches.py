"""From dataset rows to padded micro-batches.

A micro-batch holds, for B sequences padded on the right to T tokens, with N predicted tokens in all:

- `input_ids` [B, T] and `attention_mask` [B, T];
- `positions` [N], indices into the flattened [B * T] tokens: where the next token is predicted;
- `targets` [N], the tokens that are predicted there: those of the response, or all but the first of a plain text.

Only these N positions ever go through the head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tasks.runtime.stage import StageError
from tasks.training.config import LoopConfig
from tasks.training.loop import Batch, StepBatches

Encode = Callable[[str, str], tuple[list[int], int]]
"""(prompt, response) -> (input_ids, prompt_length), prompt_length 0 for plain text."""
Attach = Callable[[Sequence["Example"]], Batch]
"""More tensors for a micro-batch, aligned with its predicted tokens."""
PAD_ID = 0  # any id of the vocabulary does: the attention mask hides it and nothing is predicted from it


@dataclass(frozen=True)
class Example:
    """One tokenized row: `ids` int32 [L], of which those from `start` on are predicted (`start` >= 1)."""

    row: int
    ids: Tensor
    start: int

    @property
    def num_targets(self) -> int:
        return len(self.ids) - self.start


def tokenize(
    rows: Iterable[tuple[str, str]], encode: Encode, max_length: int, overlong: Literal["drop", "truncate"] = "drop"
) -> tuple[list[Example], dict[str, int]]:
    """Tokenize (prompt, response) rows; returns the examples and how many were kept, dropped and truncated.

    A row longer than `max_length` tokens is dropped or cut off, as `overlong` says; a row without a token to predict is
    dropped.  Raises StageError when none is left.
    """
    examples: list[Example] = []
    counts = {"num_examples": 0, "num_dropped": 0, "num_truncated": 0}
    for row, (prompt, response) in enumerate(rows):
        ids, prompt_length = encode(prompt, response)
        start = max(1, prompt_length)
        too_long = len(ids) > max_length
        if (too_long and overlong == "drop") or min(len(ids), max_length) <= start:
            counts["num_dropped"] += 1
            continue
        counts["num_truncated"] += too_long
        examples.append(Example(row, torch.tensor(ids[:max_length], dtype=torch.int32), start))
    counts["num_examples"] = len(examples)
    if not examples:
        raise StageError(
            f"no example is left: all {counts['num_dropped']} rows are empty or longer than max_length={max_length} "
            "tokens. Raise max_length, set overlong=truncate, or check the data set."
        )
    return examples, counts


def collate(examples: Sequence[Example]) -> Batch:
    """Pad to the longest; see the module's docstring."""
    length = max(len(example.ids) for example in examples)
    input_ids = torch.full((len(examples), length), PAD_ID, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    positions, targets = [], []
    for i, example in enumerate(examples):
        num = len(example.ids)
        input_ids[i, :num] = example.ids
        attention_mask[i, :num] = 1
        positions.append(torch.arange(example.start - 1, num - 1) + i * length)
        targets.append(example.ids[example.start :].long())
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "positions": torch.cat(positions),
        "targets": torch.cat(targets),
    }


def sample_indices(num: int, batch_size: int, step: int, seed: int) -> list[int]:
    """Which of `num` items step `step` takes: epochs of seeded permutations, cut into batches across their borders."""
    first = step * batch_size
    wanted = range(first, first + batch_size)
    orders = {epoch: _permutation(num, seed, epoch) for epoch in {i // num for i in wanted}}
    return [int(orders[i // num][i % num]) for i in wanted]


def by_length(items: Iterable[Any], length: Callable[[Any], int], size: int) -> list[list[Any]]:
    """Groups of at most `size` items of similar length, so that little is padded; stable order."""
    ordered = sorted(items, key=length)
    return [ordered[i : i + size] for i in range(0, len(ordered), size)]


class TokenBatches:
    """BatchSource of SFT and KD: a pure function of (seed, step); the denominator counts predicted tokens."""

    def __init__(self, examples: Sequence[Example], config: LoopConfig, attach: Attach | None = None) -> None:
        self.examples, self.config, self.attach = examples, config, attach

    def step_batches(self, step: int) -> StepBatches:
        config = self.config
        indices = sample_indices(len(self.examples), config.batch_size, step, config.seed)
        chosen = [self.examples[i] for i in indices]
        groups = by_length(chosen, lambda example: len(example.ids), config.micro_batch_size)
        extra = self.attach or (lambda _: {})
        num_targets = sum(example.num_targets for example in chosen)
        return StepBatches(
            [collate(group) | extra(group) for group in groups],
            denominator=float(num_targets),
            metrics={"num_tokens": num_targets},
        )


def _permutation(num: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(num, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
