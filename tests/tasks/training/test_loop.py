"""The loop: invariance to micro-batching, resume to the bit, the schedule, clean stops, golden losses."""

import itertools
import math
import os
import signal
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch.nn.functional import cross_entropy

from tasks.runtime.stage import StageError
from tasks.training import checkpoints
from tasks.training.batches import Example, TokenBatches, sample_indices
from tasks.training.config import LoopConfig
from tasks.training.loop import StepBatches, lr_factor, train
from tasks.training.objectives import SFTObjective
from tasks.training.optimizer import GroupRule, adam, muon_adam

GOLDEN = Path(__file__).parent / "golden" / "sft_losses.txt"


def config_of(**changes) -> LoopConfig:
    values = dict(steps=6, learning_rate=1e-2, warmup_steps=2, batch_size=6, micro_batch_size=2, checkpoint_every=3)
    return LoopConfig(**(values | changes))


def examples(num: int = 9) -> list[Example]:
    """Rows of 5 to 20 tokens of which the last 3 or more are predicted."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for row in range(num):
        length = 5 + (row * 7) % 16
        ids = torch.randint(96, (length,), generator=generator, dtype=torch.int32)
        rows.append(Example(row, ids, 1 + row % 2))
    return rows


def newest(scratch: Path) -> str | None:
    return max((folder.name for folder in scratch.glob(f"{checkpoints.PREFIX}*")), default=None)


def run(tiny_model, scratch: Path, config: LoopConfig, **kwargs):
    """Train a tiny model; returns its weights and the log."""
    model = tiny_model()
    objective = SFTObjective(model)
    rows = train(
        objective, TokenBatches(examples(), config), config, adam(objective, config), scratch=scratch, **kwargs
    )
    return {name: p.detach().clone() for name, p in model.named_parameters()}, rows


@pytest.mark.parametrize("sizes", [(1, 6), (2, 3)])
def test_loss_does_not_depend_on_micro_batches(tiny_model, tmp_path, sizes):
    """Same losses and weights for every cut of a batch of 6, though the micro-batches have different token counts."""
    results = [run(tiny_model, tmp_path / str(size), config_of(micro_batch_size=size)) for size in sizes]
    (weights, rows), (other_weights, other_rows) = results
    for row, other in zip(rows, other_rows, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, other_weights[name], rtol=1e-3, atol=2e-4)


class Killed(Exception):
    pass


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("stop_after", [3, 5])
def test_resume_continues_to_the_bit(tiny_model, tmp_path, precision, stop_after):
    """A run stopped after step 3 or 5 and started again equals an undisturbed one: weights, moments, log."""
    config = config_of(mixed_precision=precision)
    weights, rows = run(tiny_model, tmp_path / "whole", config)

    def stop(done, total, **info):
        if done == stop_after:
            raise Killed

    with pytest.raises(Killed):
        run(tiny_model, tmp_path / "killed", config, progress=stop)
    assert newest(tmp_path / "killed") == "checkpoint-00000003"
    seen = []
    resumed, resumed_rows = run(
        tiny_model, tmp_path / "killed", config, progress=lambda done, total, **info: seen.append(done)
    )
    assert seen == [4, 5, 6]
    assert resumed_rows == rows
    for name, weight in weights.items():
        assert torch.equal(weight, resumed[name]), name
    for file in ("parameters.safetensors", "optimizer-0.safetensors", "log.json"):
        last = "checkpoint-00000006"
        assert (tmp_path / "killed" / last / file).read_bytes() == (tmp_path / "whole" / last / file).read_bytes()


class Paired(LoopConfig):
    """Resumes after an even number of steps only, as GRPO does where a rollout serves two updates."""

    resumable_every: ClassVar[int] = 2  # type: ignore[misc]


@pytest.mark.parametrize(("kind", "asked_at", "saved_at"), [(LoopConfig, 2, 2), (LoopConfig, 5, 5), (Paired, 3, 4)])
def test_sigterm_saves_and_the_next_run_continues_to_the_bit(tiny_model, tmp_path, kind, asked_at, saved_at):
    config = kind(**config_of(checkpoint_every=6).model_dump())
    weights, rows = run(tiny_model, tmp_path / "whole", config)

    def ask(done, total, **info):
        if done == asked_at - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(StageError, match=f"stopped after step {saved_at} of 6"):
        run(tiny_model, tmp_path / "stopped", config, progress=ask)
    assert signal.getsignal(signal.SIGTERM) is before
    assert newest(tmp_path / "stopped") == f"checkpoint-{saved_at:08d}"
    resumed, resumed_rows = run(tiny_model, tmp_path / "stopped", config)
    assert resumed_rows == rows
    for name, weight in weights.items():
        assert torch.equal(weight, resumed[name]), name


def test_several_processes_are_refused(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(StageError, match="one process"):
        run(tiny_model, tmp_path, config_of())


def test_a_torn_checkpoint_is_not_taken(tiny_model, tmp_path):
    """What a kill leaves of a checkpoint that was being written is ignored."""
    config = config_of()
    (tmp_path / "tmp-checkpoint-00000003").mkdir(parents=True)
    (tmp_path / "tmp-checkpoint-00000003" / "log.json").write_text("[")
    _, rows = run(tiny_model, tmp_path, config)
    assert len(rows) == config.steps
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-00000003", "checkpoint-00000006"}


def test_only_safetensors_and_json_are_written(tiny_model, tmp_path):
    run(tiny_model, tmp_path, config_of())
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {".safetensors", ".json"}


def test_a_checkpoint_of_another_model_is_set_aside(tiny_model, tmp_path):
    run(tiny_model, tmp_path, config_of())
    other = SFTObjective(tiny_model(tied=False))
    assert checkpoints.restore(tmp_path, other, adam(other, config_of())) == []
    assert newest(tmp_path) is None


class Poisoned(SFTObjective):
    """An objective whose loss or gradient stops being finite at a given call."""

    def __init__(self, model, call: int, value: float, gradient_only: bool) -> None:
        super().__init__(model)
        self.left, self.value, self.gradient_only = call, value, gradient_only

    def forward(self, batch):
        loss, metrics = super().forward(batch)
        self.left -= 1
        if self.left:
            return loss, metrics
        poison = self.value * loss
        return (loss + (poison - poison.detach()) * 1e38 * 1e38) if self.gradient_only else poison, metrics


@pytest.mark.parametrize("value, gradient_only", [(float("nan"), False), (float("inf"), False), (1e38, True)])
def test_stops_when_not_finite(tiny_model, tmp_path, value, gradient_only):
    """A NaN or infinity in step 5 stops there, names step and remedy, and keeps the checkpoint of step 3."""
    config = config_of(micro_batch_size=6)
    model = tiny_model()
    objective = Poisoned(model, 5, value, gradient_only)
    with pytest.raises(StageError, match=r"step 5.*Lower learning_rate"):
        train(objective, TokenBatches(examples(), config), config, adam(objective, config), scratch=tmp_path)
    assert newest(tmp_path) == "checkpoint-00000003"
    assert all(p.isfinite().all() for p in model.parameters())


def test_schedule():
    config = config_of(steps=10, warmup_steps=4, final_lr_ratio=0.1)
    factors = [lr_factor(step, config) for step in range(10)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[7] == pytest.approx(0.1 + 0.9 * 0.5)  # half-way down the cosine
    assert all(a > b > 0.1 for a, b in itertools.pairwise(factors[4:]))
    assert lr_factor(9, config_of(steps=10, schedule="constant")) == 1.0


def test_warmup_beyond_the_end_is_refused():
    with pytest.raises(ValueError, match="lower warmup_steps"):
        config_of(warmup_steps=7)


def test_groups_have_their_own_rates(tiny_model):
    """Rates follow the schedule from each group's own peak; the first matching rule wins."""
    model = tiny_model()
    config = config_of(steps=1, warmup_steps=0, schedule="constant")
    rules = [GroupRule("norm", 3e-3), GroupRule("layers.0", 5e-3, 0.1)]
    (optimizer,) = adam(SFTObjective(model), config, rules)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        expected = 3e-3 if "norm" in name else 5e-3 if "layers.0" in name else 1e-2
        assert rates[id(parameter)] == expected, name
    with pytest.raises(ValueError, match="no trainable parameter matches"):
        adam(SFTObjective(model), config, [GroupRule("transform", 1e-3)])


def test_muon_takes_the_matrices_and_resumes(tiny_model, tmp_path):
    config = config_of(checkpoint_every=2, steps=4, learning_rate=1e-3)
    results = []
    for stop_after in (None, 3):
        folder = tmp_path / str(stop_after)

        def stop(done, total, at=stop_after, **info):
            if done == at:
                raise Killed

        for _ in range(2):
            model = tiny_model()
            objective = SFTObjective(model)
            muon, rest = muon_adam(objective, config, adam_pattern="embed", adam_learning_rate=1e-3)
            assert all(p.ndim == 2 and p is not model.model.embed_tokens.weight for p in muon.param_groups[0]["params"])
            try:
                source = TokenBatches(examples(), config)
                train(objective, source, config, [muon, rest], scratch=folder, progress=stop)
                break
            except Killed:
                stop = None
        results.append(dict(model.named_parameters()))
    for name, weight in results[0].items():
        assert torch.equal(weight, results[1][name]), name


class Empty:
    def step_batches(self, step: int) -> StepBatches:
        return StepBatches([], 1.0, {"reward_mean": 0.0})


def test_a_step_without_micro_batches_is_counted_and_changes_nothing(tiny_model, tmp_path):
    config = config_of(steps=2)
    model = tiny_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    objective = SFTObjective(model)
    rows = train(objective, Empty(), config, adam(objective, config), scratch=tmp_path)
    assert [(row["loss"], row["grad_norm"], row["reward_mean"]) for row in rows] == [(0.0, 0.0, 0.0)] * 2
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_trains_though_autograd_is_off(tiny_model, tmp_path):
    """lighteval's import switches gradients off; the loop switches them on for itself and restores what it found."""
    torch.set_grad_enabled(False)
    try:
        _, rows = run(tiny_model, tmp_path, config_of())
        assert rows[0]["grad_norm"] > 0
        assert not torch.is_grad_enabled()
        assert not torch.are_deterministic_algorithms_enabled()
    finally:
        torch.set_grad_enabled(True)


def plain_losses(model, config: LoopConfig) -> list[float]:
    """The same training written plainly: full logits, one batch per step, torch.optim.Adam, the cosine by hand."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0, betas=config.betas)
    losses = []
    for step in range(config.steps):
        rows = [examples()[i] for i in sample_indices(9, config.batch_size, step, config.seed)]
        total, num = torch.zeros(()), 0
        for row in rows:
            logits = model(input_ids=row.ids.long()[None]).logits[0]
            total = total + cross_entropy(logits[row.start - 1 : -1], row.ids[row.start :].long(), reduction="sum")
            num += len(row.ids) - row.start
        optimizer.zero_grad()
        (total / num).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        warmup = min(1.0, (step + 1) / config.warmup_steps)
        done = max(0.0, (step - config.warmup_steps) / (config.steps - config.warmup_steps))
        optimizer.param_groups[0]["lr"] = config.learning_rate * warmup * (0.5 + 0.5 * math.cos(math.pi * done))
        optimizer.step()
        losses.append(float(total.detach()) / num)
    return losses


def test_losses_are_golden_and_those_of_a_plain_loop(tiny_model, tmp_path):
    """Per-step losses of a fixed run; a change of the data order, the loss or the optimizer shows here."""
    _, rows = run(tiny_model, tmp_path, config_of())
    losses = [row["loss"] for row in rows]
    assert losses == pytest.approx([float(line) for line in GOLDEN.read_text().split()], rel=1e-4)
    assert losses == pytest.approx(plain_losses(tiny_model(), config_of()), rel=1e-4)
