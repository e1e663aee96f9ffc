"""A training run that finds its checkpoint damaged: it begins earlier, says so, and ends with the undisturbed bits."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from artifacts import scratch as midstage
from tasks.training import checkpoints
from tasks.training.batches import Example, TokenBatches
from tasks.training.loop import LoopConfig, train
from tasks.training.objectives import SFTObjective
from tasks.training.optimizer import adam

CONFIG = LoopConfig(
    steps=5, learning_rate=1e-2, warmup_steps=1, batch_size=2, micro_batch_size=2, checkpoint_every=2
)  # fmt: skip
NEWEST, OLDER = "checkpoint-00000004", "checkpoint-00000002"
FILES = ("parameters.safetensors", "optimizer-0.safetensors", "log.json", "MANIFEST.json")


class Killed(Exception):
    pass


@pytest.fixture
def run(tiny_model) -> Callable[..., tuple[dict[str, torch.Tensor], list[dict], list[int]]]:
    """Train in a scratch folder; gives the weights, the log rows and the steps that were computed."""
    generator = torch.Generator().manual_seed(1)
    examples = [Example(row, torch.randint(96, (8,), generator=generator, dtype=torch.int32), 2) for row in range(6)]

    def go(scratch: Path, stop_at: int | None = None):
        model, steps = tiny_model(), []
        objective = SFTObjective(model)

        def progress(done: int, total: int, **info: object) -> None:
            steps.append(done)
            if done == stop_at:
                raise Killed

        source = TokenBatches(examples, CONFIG)
        rows = train(objective, source, CONFIG, adam(objective, CONFIG), scratch=scratch, progress=progress)
        return {name: p.detach().clone() for name, p in model.named_parameters()}, rows, steps

    return go


@pytest.fixture
def killed(run, tmp_path) -> Path:
    """The scratch of a run that was killed after step 4, in which it had written its second checkpoint."""
    with pytest.raises(Killed):
        run(tmp_path / "scratch", stop_at=4)
    assert sorted(path.name for path in (tmp_path / "scratch").iterdir()) == [OLDER, NEWEST]
    return tmp_path / "scratch"


def assert_undisturbed(run, scratch: Path, first_step: int) -> None:
    weights, rows, steps = run(scratch)
    expected, expected_rows, _ = run(scratch.parent / "undisturbed")
    assert steps == list(range(first_step, CONFIG.steps + 1))
    assert rows == expected_rows
    assert all(torch.equal(weight, expected[name]) for name, weight in weights.items())


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_taken(run, killed, damage, caplog, name):
    damage(killed / NEWEST / name)
    with caplog.at_level(logging.WARNING, "artifacts"):
        assert_undisturbed(run, killed, first_step=3)
    assert (killed / f"damaged-{NEWEST}-1").is_dir()
    assert [message.startswith(f"damaged: {NEWEST}") for message in caplog.messages] == [True]


def test_with_no_sound_checkpoint_it_begins_anew(run, killed, damage):
    damage(killed / NEWEST / "parameters.safetensors")
    damage(killed / OLDER / "log.json")
    assert_undisturbed(run, killed, first_step=1)


def reseal(folder: Path, change: Callable[[Path], None]) -> None:
    """Change a checkpoint and give it right checksums."""
    with midstage.writing(folder.with_name("new")) as inside:
        for name in FILES[:-1]:
            shutil.copyfile(folder / name, inside / name)
        change(inside)
    midstage.remove(folder)
    folder.with_name("new").rename(folder)


def change_tensors(file: str, change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / file)
        change(tensors)
        save_file(tensors, folder / file)

    return apply


NORM = "model.model.norm.weight"
FOREIGN = {
    "a parameter less": change_tensors(FILES[0], lambda t: t.pop(NORM)),
    "another shape": change_tensors(FILES[0], lambda t: t.update({NORM: torch.ones(3)})),
    "another type": change_tensors(FILES[0], lambda t: t.update({NORM: t[NORM].bfloat16()})),
    "moments of another shape": change_tensors(FILES[1], lambda t: t.update({"0.exp_avg": torch.ones(3)})),
    "moments of a parameter that is not": change_tensors(FILES[1], lambda t: t.update({"99.step": torch.ones(())})),
    "moments without a number": change_tensors(FILES[1], lambda t: t.update({"exp_avg": torch.ones(())})),
    "another number of steps": lambda folder: (folder / "log.json").write_text(json.dumps([{"step": 1}])),
    "a log that is none": lambda folder: (folder / "log.json").write_text("null"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_whole_checkpoint_of_another_run_is_set_aside_and_nothing_of_it_is_loaded(run, killed, name):
    reseal(killed / NEWEST, FOREIGN[name])
    assert midstage.is_sound(killed / NEWEST)
    assert_undisturbed(run, killed, first_step=3)


@pytest.mark.parametrize("what", ["a file", "an empty folder", "an old copy under a new name"])
def test_things_that_only_have_the_name(run, killed, what):
    intruder = killed / "checkpoint-00000005"
    if what == "a file":
        intruder.write_text("")
    elif what == "an empty folder":
        intruder.mkdir()
    else:
        shutil.copytree(killed / OLDER, intruder)
    assert_undisturbed(run, killed, first_step=5)


def test_two_checkpoints_are_kept_and_there_are_never_more(run, killed, monkeypatch):
    seen = []
    real = checkpoints._save_tensors

    def watching(tensors, path: Path) -> None:
        seen.append(sorted(folder.name for folder in path.parent.parent.iterdir()))
        real(tensors, path)

    monkeypatch.setattr(checkpoints, "_save_tensors", watching)
    run(killed.parent / "whole")
    assert max(len(names) for names in seen) == 2, "the one before and the one that is being written"
    assert sorted(path.name for path in (killed.parent / "whole").iterdir()) == [OLDER, NEWEST]
