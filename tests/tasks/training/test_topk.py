"""The teacher's cache: it is taken for the very tokens that the teacher saw, prompts included."""

from pathlib import Path

import pytest
import torch

from tasks.base_model import bundled_folder
from tasks.checkpoints.models import load_model
from tasks.runtime.stage import StageError
from tasks.training.batches import Example
from tasks.training.topk import TopKCache, shard_name, write_index, write_shard

IDS = [300, 301, 302, 303, 304, 305]


def examples(*rows: list[int]) -> list[Example]:
    return [Example(row, torch.tensor(ids, dtype=torch.int32), start=3) for row, ids in enumerate(rows)]


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("topk")
    shard = examples(IDS, IDS[::-1])
    write_shard(load_model(bundled_folder(), torch.float32), shard, folder / shard_name(0), 4, 1.0, 2)
    write_index([shard], folder, 4, 1.0)
    return folder


def test_the_same_tokens_are_taken(cache):
    same = examples(IDS, IDS[::-1])
    assert TopKCache(cache, same, 1.0)(same)["teacher_values"].shape == (6, 4)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_another_prompt_is_refused(cache, place):
    """Responses are alike; one token of the prompt differs, as by a date or a system message."""
    other = [*IDS[::-1]]
    other[place] += 1
    with pytest.raises(StageError, match=r"other prompts for 1 rows \(first: row 1\).*teacher_topk anew"):
        TopKCache(cache, examples(IDS, other), 1.0)


def test_another_response_is_refused(cache):
    other = examples([*IDS[:5], 306], IDS[::-1])
    with pytest.raises(StageError, match="saw other tokens"):
        TopKCache(cache, other, 1.0)(other)
