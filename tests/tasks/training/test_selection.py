"""Which state a run gives: scripted measures, kills, damage, early ends, divergence."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

from tasks.runtime.stage import StageError
from tasks.training.batches import Example, TokenBatches
from tasks.training.config import StudentConfig
from tasks.training.loop import train
from tasks.training.objectives import SFTObjective
from tasks.training.optimizer import adam
from tasks.training.selection import Measure, Selection

Weights = dict[str, torch.Tensor]


class Killed(Exception):
    pass


def config_of(**changes) -> StudentConfig:
    values = dict(
        steps=8, learning_rate=1e-2, batch_size=2, micro_batch_size=2, checkpoint_every=3, validate_every=2, keep="best"
    )  # fmt: skip
    return StudentConfig(**(values | changes))


class Run:
    """A tiny SFT run whose measure is scripted: `figures` by step."""

    def __init__(self, model: nn.Module, figures: Callable[[int], float], higher_is_better: bool = False) -> None:
        self.model, self.figures, self.higher_is_better = model, figures, higher_is_better
        self.measured: list[int] = []
        self.states: dict[int, Weights] = {}

    def __call__(self, scratch: Path, config: StudentConfig, stop_at: int | None = None) -> tuple[list[dict], dict]:  # type: ignore[type-arg]
        generator = torch.Generator().manual_seed(1)
        examples = [
            Example(row, torch.randint(96, (8,), generator=generator, dtype=torch.int32), 2) for row in range(6)
        ]

        def measure(step: int) -> dict[str, float]:
            self.measured.append(step)
            self.states[step] = self.weights()
            return {"score": self.figures(step)}

        def progress(done: int, total: int, **info: object) -> None:
            self.shown = info
            if done == stop_at:
                raise Killed

        objective = SFTObjective(self.model)
        selection = Selection(Measure("score", self.higher_is_better, measure), config, scratch)
        rows = train(
            objective,
            TokenBatches(examples, config),
            config,
            adam(objective, config),
            scratch=scratch,
            progress=progress,
            selection=selection,
        )
        return rows, selection.facts(rows)

    def weights(self) -> Weights:
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}


def same(left: Weights, right: Weights) -> bool:
    return all(torch.equal(value, right[name]) for name, value in left.items())


def scripted(figures: Sequence[float], every: int = 2) -> Callable[[int], float]:
    return lambda step: figures[step // every]


@pytest.mark.parametrize(
    ("figures", "higher", "kept"),
    [
        ([3, 2, 1, 2, 4], False, 4),
        ([3, 2, 1, 2, 4], True, 8),
        ([1, 2, 3, 4, 5], False, 0),
        ([1, 1, 1, 1, 1], False, 0),
        ([1, 1, 1, 1, 1], True, 0),
        ([3, 1, 1, 2, 1], False, 2),
        ([3, float("nan"), 2, float("inf"), 4], False, 4),
        ([float("nan"), float("nan"), float("inf"), float("nan"), float("nan")], False, 0),
        ([float("nan"), 9, float("nan"), 9, 9], False, 2),
    ],
)
def test_the_best_is_kept_of_equal_ones_the_earliest(tiny_model, tmp_path, figures, higher, kept):
    run = Run(tiny_model(), scripted(figures), higher)
    rows, facts = run(tmp_path, config_of())
    assert run.measured == [0, 2, 4, 6, 8] and [row["step"] for row in rows] == list(range(9))
    assert [row["step"] for row in rows if "validation_score" in row] == run.measured
    assert facts["kept_step"] == kept and same(run.weights(), run.states[kept])
    assert kept != 8 or not same(run.weights(), run.states[0])


@pytest.mark.parametrize(("every", "steps", "measured"), [(3, 8, [0, 3, 6, 8]), (100, 8, [0, 8]), (1, 2, [0, 1, 2])])
def test_start_and_end_are_measured_whatever_lies_between(tiny_model, tmp_path, every, steps, measured):
    run = Run(tiny_model(), lambda step: 1.0)
    _, facts = run(tmp_path, config_of(validate_every=every, steps=steps))
    assert run.measured == measured and run.shown["validation_score"] == 1.0
    assert facts == {
        "kept_step": 0, "validation_score_start": 1.0, "validation_score_best": 1.0, "validation_score_last": 1.0
    }  # fmt: skip


def test_the_last_is_kept_where_that_is_asked_and_nothing_is_stored_for_it(tiny_model, tmp_path):
    run = Run(tiny_model(), float)
    _, facts = run(tmp_path, config_of(keep="last"))
    assert facts["kept_step"] == 8 and same(run.weights(), run.states[8])
    assert (facts["validation_score_best"], facts["validation_score_last"]) == (0.0, 8.0)
    assert not list(tmp_path.glob("best-*"))


@pytest.mark.parametrize("keep", ["best", "last"])
@pytest.mark.parametrize(
    ("figures", "patience", "last"), [([5, 4, 6, 6, 1], 2, 6), ([5, 6, 6, 6, 1], 1, 2), ([5, 4, 3, 2, 1], 1, 8)]
)
def test_patience_ends_a_run_that_no_longer_gets_better(tiny_model, tmp_path, figures, patience, last, keep):
    run = Run(tiny_model(), scripted(figures))
    rows, facts = run(tmp_path, config_of(patience=patience, keep=keep))
    assert rows[-1]["step"] == last
    assert facts["kept_step"] == (last if keep == "last" else 2 * figures.index(min(figures[: last // 2 + 1])))


@pytest.mark.parametrize("figures", [[5, 4, 3, 2, 1], [1, 2, 3, 4, 5], [5, 1, 4, 0, 3], [5, 4, 6, 7, 1]])
@pytest.mark.parametrize("stop_at", range(1, 9))
def test_a_killed_run_makes_the_same_choice(tiny_model, tmp_path, figures, stop_at):
    config = config_of(patience=4)
    whole = Run(tiny_model(), scripted(figures))
    expected = whole(tmp_path / "whole", config)
    with pytest.raises(Killed):
        Run(tiny_model(), scripted(figures))(tmp_path / "killed", config, stop_at)
    again = Run(tiny_model(), scripted(figures))
    assert again(tmp_path / "killed", config) == expected
    assert same(again.weights(), whole.weights())


def test_a_run_that_goes_on_still_has_what_its_checkpoint_chose(tiny_model, tmp_path):
    """The kill came after a better state than the checkpoint knew of; this time that one is not better any more."""
    config = config_of(validate_every=1, steps=8, checkpoint_every=3)
    first = Run(tiny_model(), lambda step: {1: 1.0, 5: 0.5}.get(step, 2.0))
    with pytest.raises(Killed):
        first(tmp_path, config, stop_at=5)
    assert sorted(path.name for path in tmp_path.glob("best-*")) == ["best-00000001", "best-00000005"]
    again = Run(tiny_model(), lambda step: 2.0)
    _, facts = again(tmp_path, config)
    assert facts["kept_step"] == 1 and same(again.weights(), first.states[1])


def test_no_more_states_lie_on_disk_than_can_be_asked_for(tiny_model, tmp_path):
    config = config_of(validate_every=1, checkpoint_every=2)
    run = Run(tiny_model(), lambda step: -float(step))
    with pytest.raises(Killed):
        run(tmp_path, config, stop_at=7)
    assert sorted(path.name for path in tmp_path.glob("best-*")) == [f"best-{step:08d}" for step in (4, 6, 7)]


@pytest.mark.parametrize("file", ["parameters.safetensors", "MANIFEST.json"])
def test_a_damaged_best_state_is_made_again(tiny_model, tmp_path, damage, file, caplog):
    config, figures = config_of(), scripted([5, 1, 4, 3, 2])
    whole = Run(tiny_model(), figures)
    expected = whole(tmp_path / "whole", config)
    with pytest.raises(Killed):
        Run(tiny_model(), figures)(tmp_path / "killed", config, stop_at=7)
    damage(tmp_path / "killed" / "best-00000002" / file)
    again = Run(tiny_model(), figures)
    with caplog.at_level(logging.WARNING, "artifacts"):
        assert again(tmp_path / "killed", config) == expected
    assert again.measured[0] == 0 and same(again.weights(), whole.weights())
    assert any("best-00000002" in message for message in caplog.messages)


def test_a_best_state_damaged_at_the_end_is_one_message_and_then_made_again(tiny_model, tmp_path, damage):
    config, figures = config_of(), scripted([5, 1, 4, 3, 2])

    def damaging(step: int) -> float:
        if step == 8:
            damage(tmp_path / "best-00000002" / "parameters.safetensors")
        return figures(step)

    with pytest.raises(StageError, match="of step 2, is damaged: run the same command again"):
        Run(tiny_model(), damaging)(tmp_path, config)
    again = Run(tiny_model(), figures)
    assert again(tmp_path, config)[1]["kept_step"] == 2 and same(again.weights(), again.states[2])


class Breaking(SFTObjective):
    def forward(self, batch):
        loss, metrics = super().forward(batch)
        self.calls = getattr(self, "calls", 0) + 1
        return loss * (float("nan") if self.calls > 4 else 1.0), metrics


NAN = float("nan")


@pytest.mark.parametrize(
    ("keep", "start", "survives"), [("best", 3.0, True), ("last", 3.0, False), ("best", NAN, False)]
)
def test_training_that_diverges_gives_its_best_state_where_it_keeps_one(
    tiny_model, tmp_path, monkeypatch, caplog, keep, start, survives
):
    monkeypatch.setattr(f"{__name__}.SFTObjective", Breaking)
    run = Run(tiny_model(), lambda step: start - (step == 2))
    config = config_of(keep=keep)
    if not survives:
        with pytest.raises(StageError, match="stopped at step 5"):
            run(tmp_path, config)
        return
    with caplog.at_level(logging.WARNING, "artifacts"):
        rows, facts = run(tmp_path, config)
    assert rows[-1]["step"] == 4 and facts["kept_step"] == 2 and same(run.weights(), run.states[2])
    assert any("Lower learning_rate" in message for message in caplog.messages)
