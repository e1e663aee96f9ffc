"""A teacher's largest log-probabilities on the predicted tokens of a dataset, for many students to share one pass.

A shard holds, for the tokens of its rows one after the other (M in all), `values` fp32 [M, K] (log-probabilities at the
cache's temperature), `indices` int32 [M, K] and `targets` int32 [M]; `teacher.json` says which rows lie where,
and after which prompts they came.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from tasks.runtime.stage import StageError
from tasks.training.batches import Example, by_length, collate
from tasks.training.loop import Batch
from tasks.training.losses import chunk_size, head_logits
from tasks.training.objectives import head_weight, predicting_states

INDEX_FILE = "teacher.json"


def shard_name(number: int) -> str:
    return f"topk-{number:05d}.safetensors"


@torch.no_grad()
def top_k(model: PreTrainedModel, batch: Batch, k: int, temperature: float) -> tuple[Tensor, Tensor]:
    """The k largest log-probabilities at `temperature` and their token ids, [N, K] each, in falling order."""
    hidden_NH, weight_VH = predicting_states(model, batch), head_weight(model)
    parts = [
        torch.log_softmax(head_logits(chunk_CH, weight_VH) / temperature, -1).topk(k, dim=-1)
        for chunk_CH in hidden_NH.split(chunk_size(weight_VH))
    ]
    return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])


def write_shard(
    model: PreTrainedModel, examples: Sequence[Example], path: Path, k: int, temperature: float, micro_batch_size: int
) -> None:
    """Compute the shard of `examples` and write it to `path`."""
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for group in by_length(examples, lambda example: len(example.ids), micro_batch_size):
        batch = {name: value.to(model.device) for name, value in collate(group).items()}
        values_NK, indices_NK = top_k(model, batch, k, temperature)
        sizes = [example.num_targets for example in group]
        for example, values, indices in zip(group, values_NK.split(sizes), indices_NK.split(sizes), strict=True):
            found[example.row] = (values.cpu(), indices.int().cpu())
    tensors = {
        "values": torch.cat([found[example.row][0] for example in examples]),
        "indices": torch.cat([found[example.row][1] for example in examples]),
        "targets": torch.cat([example.ids[example.start :] for example in examples]),
    }
    save_file(tensors, path)


def write_index(shards: Iterable[Sequence[Example]], folder: Path, k: int, temperature: float) -> None:
    """Write `teacher.json`: K, the temperature, and per shard its rows, numbers of tokens and prompts' digests."""
    contents = [
        {
            "rows": [example.row for example in shard],
            "num_tokens": [example.num_targets for example in shard],
            "prompts": [prompt_digest(example) for example in shard],
        }
        for shard in shards
    ]
    (folder / INDEX_FILE).write_text(json.dumps({"k": k, "temperature": temperature, "shards": contents}))


def prompt_digest(example: Example) -> str:
    """Names the tokens before the predicted ones: the same response after another prompt has other probabilities."""
    return hashlib.sha256(example.ids[: example.start].numpy().tobytes()).hexdigest()[:32]


class TopKCache:
    """Reads a teacher_topk artifact; called with the examples of a micro-batch, gives their teacher tensors."""

    def __init__(self, folder: Path, examples: Iterable[Example], temperature: float) -> None:
        index = json.loads((folder / INDEX_FILE).read_text())
        if index["temperature"] != temperature:
            raise StageError(
                f"the cached teacher has temperature {index['temperature']}, this training {temperature}: "
                "set both alike, or train without the cache"
            )
        self.folder = folder
        self.places = _places(index["shards"])
        missing = [e.row for e in examples if e.row not in self.places or self.places[e.row][2] != e.num_targets]
        if missing:
            raise StageError(
                f"the cached teacher does not fit {len(missing)} rows of the data set (first: row {missing[0]}): make "
                "teacher_topk with the same data, max_length, overlong, prompt_suffix and enable_thinking"
            )
        prompts = {
            row: prompt for s in index["shards"] for row, prompt in zip(s["rows"], s.get("prompts", ()), strict=False)
        }
        if others := [e.row for e in examples if prompts.get(e.row) != prompt_digest(e)]:
            raise StageError(
                f"the cached teacher saw other prompts for {len(others)} rows (first: row {others[0]}): make "
                "teacher_topk anew with this student's chat template, prompt_suffix and enable_thinking"
            )

    def __call__(self, examples: Sequence[Example]) -> Batch:
        parts = [self._read(example) for example in examples]
        return {
            "teacher_values": torch.cat([values for values, _ in parts]),
            "teacher_indices": torch.cat([indices for _, indices in parts]),
        }

    def _read(self, example: Example) -> tuple[Tensor, Tensor]:
        shard, start, num = self.places[example.row]
        tokens = slice(start, start + num)
        with safe_open(self.folder / shard_name(shard), framework="pt") as file:
            values, indices, targets = (file.get_slice(name)[tokens] for name in ("values", "indices", "targets"))
        if not torch.equal(targets, example.ids[example.start :]):
            raise StageError(
                f"row {example.row}: the cached teacher saw other tokens: make teacher_topk anew with this student's "
                "tokenizer and data"
            )
        return values, indices


def _places(shards: list[dict[str, list[int]]]) -> dict[int, tuple[int, int, int]]:
    """row -> (shard, first token in it, number of tokens)."""
    places = {}
    for number, shard in enumerate(shards):
        starts = accumulate(shard["num_tokens"], initial=0)
        for row, start, num in zip(shard["rows"], starts, shard["num_tokens"], strict=False):
            places[row] = (number, start, num)
    return places
