"""Padding, masks, epochs: batches against plain loops."""

from collections import Counter

import pytest
import torch

from tasks.runtime.stage import StageError
from tasks.training.batches import Example, TokenBatches, collate, sample_indices, tokenize
from tasks.training.config import LoopConfig
from tasks.training.losses import cross_entropy, head_loss
from tasks.training.objectives import SFTObjective, head_weight, predicting_states


def encode(prompt: str, response: str) -> tuple[list[int], int]:
    """One token per letter."""
    return [ord(c) - 96 for c in prompt + response], len(prompt)


def test_tokenize_counts_what_it_leaves_out():
    rows = [("ab", "cde"), ("", "abc"), ("a", ""), ("abc", "abcdefgh"), ("", "a")]
    examples, counts = tokenize(rows, encode, max_length=6)
    assert [(e.row, e.ids.tolist(), e.start) for e in examples] == [(0, [1, 2, 3, 4, 5], 2), (1, [1, 2, 3], 1)]
    assert counts == {"num_examples": 2, "num_dropped": 3, "num_truncated": 0}
    examples, counts = tokenize(rows, encode, max_length=6, overlong="truncate")
    assert examples[2].ids.tolist() == [1, 2, 3, 1, 2, 3] and counts["num_truncated"] == 1


def test_no_example_left_is_an_error():
    with pytest.raises(StageError, match="max_length=2"):
        tokenize([("ab", "cde")], encode, max_length=2)


def test_collate_predicts_the_response_only():
    rows = [Example(0, torch.tensor([5, 6, 7, 8], dtype=torch.int32), 2), Example(1, torch.tensor([9, 3]).int(), 1)]
    batch = collate(rows)
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    flat = batch["input_ids"].flatten()
    pairs = [(int(flat[p]), int(t)) for p, t in zip(batch["positions"], batch["targets"], strict=True)]
    assert pairs == [(6, 7), (7, 8), (9, 3)]


def test_loss_is_that_of_each_row_alone(tiny_model):
    """The padded batch against a loop over unpadded rows, in float64."""
    model = tiny_model().double()
    rows = [Example(i, torch.randint(96, (n,)).int(), s) for i, (n, s) in enumerate([(9, 4), (5, 1), (12, 11)])]
    loss, _ = SFTObjective(model)(collate(rows))
    expected = 0.0
    for row in rows:
        log_p = torch.log_softmax(model(input_ids=row.ids.long()[None]).logits[0].detach().double(), -1)
        expected -= sum(float(log_p[t - 1, int(row.ids[t])]) for t in range(row.start, len(row.ids)))
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-6)


def test_untied_head_gets_its_gradient(tiny_model):
    """Trained head: the chunked gradient equals that of autograd through full logits."""
    model = tiny_model(tied=False).double()
    batch = collate([Example(0, torch.arange(10).int(), 3)])
    loss, _ = head_loss(predicting_states(model, batch), head_weight(model), cross_entropy(batch["targets"]), 2)
    loss.backward()
    found = model.lm_head.weight.grad.clone()
    model.zero_grad()
    logits = model(input_ids=batch["input_ids"]).logits[0, 2:9].double()
    torch.nn.functional.cross_entropy(logits, batch["targets"], reduction="sum").backward()
    torch.testing.assert_close(found, model.lm_head.weight.grad, rtol=1e-6, atol=1e-8)


def test_epochs_take_each_row_once():
    """10 rows in batches of 4: steps 0 to 4 are two epochs; the order differs between epochs and seeds."""
    drawn = [i for step in range(5) for i in sample_indices(10, 4, step, seed=3)]
    assert Counter(drawn[:10]) == Counter(drawn[10:]) == Counter(range(10))
    assert drawn[:10] != drawn[10:]
    assert drawn[:4] != sample_indices(10, 4, 0, seed=4)
    assert sample_indices(3, 8, 0, seed=0)[:3] != []  # a batch may span epochs


def test_step_batches_are_a_function_of_seed_and_step():
    config = LoopConfig(steps=9, learning_rate=1.0, batch_size=5, micro_batch_size=2)
    rows = [Example(i, torch.arange(3 + i).int(), 1) for i in range(8)]
    source = TokenBatches(rows, config)
    later = source.step_batches(7)
    for step in range(3):
        source.step_batches(step)
    again = TokenBatches(rows, config).step_batches(7)
    assert [len(batch["input_ids"]) for batch in later.micro_batches] == [2, 2, 1]
    assert later.denominator == sum(len(batch["targets"]) for batch in later.micro_batches)
    for a, b in zip(later.micro_batches, again.micro_batches, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
