"""The one training loop: pretraining, SFT, KD and GRPO differ only in their objective and their batch source.

A step sums `loss_sum / denominator` over its micro-batches, where the denominator belongs to the whole step.  So the
loss and its gradient do not depend on how a step is cut into micro-batches.

A stage trains on one process.  What of a run it gives, and when it stops early, says selection.py.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from tasks.runtime.processes import stop_requested
from tasks.runtime.stage import StageError
from tasks.training import checkpoints
from tasks.training.config import LoopConfig
from tasks.training.selection import LAST_STATE, LastState

logger = logging.getLogger("artifacts.training")
"""Below `artifacts`, whose warnings a run shows as notes."""


class Diverged(StageError):
    """The loss or the gradient norm is not finite; the weights are those of the step before."""


Batch = dict[str, Tensor]
Row = dict[str, Any]
Progress = Callable[..., None]


@dataclass(frozen=True)
class StepBatches:
    """The batches of one optimizer step."""

    micro_batches: Sequence[Batch]
    """May be empty: the step is then counted and logged with loss 0 and changes nothing."""
    denominator: float
    """What the summed loss is divided by (tokens, sequences ...)."""
    metrics: dict[str, float | None] = field(default_factory=dict)
    """Logged with the step as they are; deterministic values only."""
    samples: Sequence[Row] = ()
    """Of the step, for people to read; they stand in its row under "samples" and so are part of every checkpoint."""


class BatchSource(Protocol):
    def step_batches(self, step: int) -> StepBatches:
        """Batches of step 0, 1 ...: a function of (seed, step) and, in reinforcement learning, the model's weights."""
        ...


class Objective(Protocol):
    """An `nn.Module` whose forward maps a micro-batch to (loss_sum, metrics).

    `loss_sum` is a scalar; the loop divides it by the step's denominator.  A metric is a tensor [2] of (sum, count),
    logged as sum / count over the step, or, if its name starts with `max_`, a tensor [1] of which the maximum is
    logged.
    """

    def __call__(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]: ...


def lr_factor(step: int, config: LoopConfig) -> float:
    """Factor on every group's learning rate at 0-based `step`: linear warmup to 1, then cosine to `final_lr_ratio`."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.final_lr_ratio + (1 - config.final_lr_ratio) * 0.5 * (1 + math.cos(math.pi * done))


def train(
    objective: nn.Module,
    source: BatchSource,
    config: LoopConfig,
    optimizers: Sequence[torch.optim.Optimizer],
    *,
    scratch: Path,
    device: str = "cpu",
    progress: Progress | None = None,
    selection: LastState = LAST_STATE,
) -> list[Row]:
    """Train `objective` in place for at most `config.steps` steps and return one log row per step.

    `progress(done, total, unit="step", loss=...)` is called after each step.  Every `checkpoint_every` steps, and
    on SIGTERM, the state goes to `scratch`; a call that finds a checkpoint there continues it, and ends with the same
    bits on one machine.  With a `Selection` the first row is the start's, step 0, and `objective` ends as the state
    that was chosen.
    Raises StageError when the loss or the gradient norm is not finite, unless there is a best state to give; the last
    checkpoint stays in `scratch`.
    """
    with _deterministic(), stop_requested() as stopping:
        accelerator = _accelerator(config.mixed_precision, device)
        trainer = _Trainer(objective, config, optimizers, accelerator)
        rows = checkpoints.restore(scratch, objective, optimizers, selection.can_continue) or selection.start(objective)
        while (done := checkpoints.num_steps(rows)) < config.steps and not selection.is_over(rows):
            torch.manual_seed(config.seed * 1_000_003 + done)
            try:
                rows.append(trainer.step(done, source.step_batches(done)))
            except Diverged as error:
                if not selection.survives(rows):
                    raise
                logger.warning("%s; the best state before it is given", error)
                break
            done += 1
            selection.watch(objective, rows)
            stop = stopping() and done % config.resumable_every == 0
            if stop or done % config.checkpoint_every == 0:
                checkpoints.save(scratch, objective, optimizers, rows)
            if stop:
                raise StageError(f"stopped after step {done} of {config.steps}; the same command goes on from it")
            if progress is not None:
                progress(done, config.steps, unit="step", loss=rows[-1]["loss"], **selection.shown(rows))
        selection.settle(objective, rows)
    return rows


class _Trainer:
    """One step at a time, with the module and the optimizers wrapped by accelerate."""

    def __init__(
        self,
        objective: nn.Module,
        config: LoopConfig,
        optimizers: Sequence[torch.optim.Optimizer],
        accelerator: Accelerator,
    ) -> None:
        self.config, self.accelerator = config, accelerator
        self.module = accelerator.prepare(objective)
        self.optimizers = [accelerator.prepare(optimizer) for optimizer in optimizers]
        self.parameters = [p for p in objective.parameters() if p.requires_grad]
        self.module.train()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group.setdefault("initial_lr", group["lr"])

    def step(self, step: int, batches: StepBatches) -> Row:
        lr = self._set_learning_rate(step)
        loss, metrics = self._accumulate(batches)
        norm = float(self.accelerator.clip_grad_norm_(self.parameters, self.config.max_grad_norm))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise Diverged(
                f"training stopped at step {step + 1}: loss {loss}, gradient norm {norm}. "
                f"The last good checkpoint is kept. Lower learning_rate (now {self.config.learning_rate}), "
                "lengthen warmup_steps or lower max_grad_norm."
            )
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        row = {"step": step + 1, "loss": loss, "lr": lr, "grad_norm": norm, **metrics, **batches.metrics}
        return row | ({"samples": list(batches.samples)} if batches.samples else {})

    def _set_learning_rate(self, step: int) -> float:
        factor = lr_factor(step, self.config)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
        return self.config.learning_rate * factor

    def _accumulate(self, batches: StepBatches) -> tuple[float, dict[str, float | None]]:
        """Gradients of the step's loss into `.grad`; returns the loss and the metrics."""
        denominator = batches.denominator
        if batches.micro_batches and denominator <= 0:
            raise ValueError(f"denominator {denominator}: a step with micro-batches needs a positive denominator")
        loss = torch.zeros(1, dtype=torch.float64)
        gathered: dict[str, Tensor] = {}
        for batch in batches.micro_batches:
            loss_sum, metrics = self.module({name: value.to(self.accelerator.device) for name, value in batch.items()})
            self.accelerator.backward(loss_sum * (1 / denominator))
            loss += loss_sum.detach().double().cpu()
            for name, value in metrics.items():
                value = value.detach().double().cpu()
                old = gathered.get(name)
                gathered[name] = value if old is None else _merge(name, old, value)
        mean = float(loss) / denominator if batches.micro_batches else 0.0
        return mean, {name: _logged(name, value) for name, value in gathered.items()}


def _logged(name: str, value: Tensor) -> float | None:
    """What the log says of one metric of a step; None for a mean over nothing."""
    if name.startswith("max_"):
        return float(value)
    total, count = value.tolist()
    return total / count if count else None


def _merge(name: str, left: Tensor, right: Tensor) -> Tensor:
    return torch.maximum(left, right) if name.startswith("max_") else left + right


def _accelerator(mixed_precision: str, device: str) -> Accelerator:
    """An Accelerator of its own for each run: several stages with different precisions share one process."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise StageError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} is set, and a stage trains on one process: unset it, or start "
            "the run without torchrun"
        )
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(mixed_precision=mixed_precision, cpu=torch.device(device).type == "cpu")


@contextmanager
def _deterministic() -> Iterator[None]:
    """Deterministic kernels, and gradients on: importing lighteval turns autograd off for the whole thread."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    # On CUDA the cumulative sums of a sampler have no deterministic kernel: PyTorch then warns instead of stopping.
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    try:
        with torch.enable_grad():
            yield
    finally:
        torch.use_deterministic_algorithms(before)
