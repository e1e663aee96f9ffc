"""The calibration of one decoder block: its transforms and clips learn to keep the full-precision block's outputs.

The inputs are the full-precision model's, the loss is the mean squared error over the tokens that count, divided by
itself so that blocks learn alike however large their outputs are (ruikangliu/FlatQuant:flatquant/train_utils.py; AdamW
with its default weight decay of .01, batches in a fixed order).  Weights stay as they are.  Everything is computed in
float32, inverses in float64.

A transform may drift towards a singular one, whose inverse in the weights is rounding error.  So condition numbers are
looked at after every epoch: a block with one beyond the limit, or whose loss is not finite, starts anew from its
initial transforms at a third of the learning rate, and the report says so.

Dimensions: B sequences of a batch, T tokens, H hidden size, N tokens that count, I input features.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from quant.calibration.statistics import not_finite
from quant.calibration.streaming import Batch, BlockRun
from quant.decoder import ATTENTION, DOWN, INPUT_SITES, MLP
from quant.methods.options import FlatQuantOptions
from quant.student.sites import learned_parameters
from quant.transforms.kronecker import KroneckerTransform

CLIP_RATE = 10.0
"""Learning rate of clips, times that of transforms."""
FINAL_RATE = 1e-3
"""Learning rate at the end of the cosine, times the first."""
RETRY_RATE = 1 / 3
SCALED_SITES = (ATTENTION, MLP, DOWN)
"""Input sites whose transform has a scale per channel."""


@dataclass(frozen=True)
class Calibration:
    """How the calibration of a block went."""

    first_loss: float
    """Mean squared error of the block's outputs, over the first epoch ..."""
    last_loss: float
    """... and over the last."""
    condition_number: float
    """The largest of its transforms', at the end."""
    retries: int
    learning_rate: float


class _Unstable(Exception):
    """Why a calibration cannot go on."""


def float_copy(block: nn.Module) -> nn.Module:
    return copy.deepcopy(block).float()


def observe(run: BlockRun) -> tuple[list[Batch], dict[str, Tensor]]:
    """The float32 block's outputs as batches, and by site (SCALED_SITES) the largest |x| [I] of its inputs.

    Raises ValueError when there are no batches or an input is not finite.
    """
    first_linear = {site: INPUT_SITES[site][0] for site in SCALED_SITES}
    targets = [replace(batch) for batch in run.batches]
    max_inputs: dict[str, Tensor] = {}
    for batch, calls in BlockRun(float_copy(run.block), targets, run.index).advance_recorded(first_linear.values()):
        for site, linear in first_linear.items():
            max_I = _valid(calls[linear].args[0], batch.mask_BT).abs().amax(0)
            max_inputs[site] = torch.maximum(max_inputs.get(site, max_I), max_I)
    if not max_inputs:
        raise ValueError("there are no calibration sequences; give a calibration set that is not empty")
    if not all(bool(max_I.isfinite().all()) for max_I in max_inputs.values()):
        raise not_finite(next(run.block.parameters()).dtype)
    return targets, max_inputs


def calibrate(
    start: Callable[[], nn.Module], run: BlockRun, targets: Sequence[Batch], options: FlatQuantOptions
) -> tuple[nn.Module, Calibration]:
    """The block that `start` prepares, trained to give `targets` for the batches of `run`.

    Where training is unstable, `start` is asked for another one; ValueError when the retries are used up.
    """
    reasons = []
    for retries in range(options.max_retries + 1):
        learning_rate = options.learning_rate * RETRY_RATE**retries
        block = start()
        try:
            losses, condition_number = _train(block, run, targets, options, learning_rate)
        except (_Unstable, torch.linalg.LinAlgError) as error:
            reasons.append(f"at learning rate {learning_rate:.2g} {error}")
        else:
            return block, Calibration(losses[0], losses[-1], condition_number, retries, learning_rate)
    raise ValueError(
        f"calibration is unstable: {'; '.join(reasons)}. Lower flatquant.learning_rate, or give more calibration "
        "sequences; where only the condition number is in the way, raise flatquant.max_condition_number"
    )


def _train(
    block: nn.Module, run: BlockRun, targets: Sequence[Batch], options: FlatQuantOptions, learning_rate: float
) -> tuple[list[float], float]:
    """The mean loss of each epoch, and the largest condition number at the end."""
    transforms, clips = learned_parameters(block.requires_grad_(False))
    for parameter in (*transforms, *clips):
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(transforms, lr=learning_rate)
    optimizer.add_param_group({"params": clips, "lr": learning_rate * CLIP_RATE})
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, T_max=options.epochs * len(targets), eta_min=learning_rate * FINAL_RATE
    )
    student = BlockRun(block, run.batches, run.index)
    losses: list[float] = []
    for epoch in range(1, options.epochs + 1):
        total = 0.0
        for position, target in enumerate(targets):
            total += _step(student, position, target, optimizer)
            schedule.step()
        losses.append(total / len(targets))
        condition_number = _largest_condition_number(block)
        if condition_number > options.max_condition_number:
            raise _Unstable(f"a condition number reached {condition_number:.2g} in epoch {epoch}")
        run.progress(epoch / options.epochs, {"epoch": epoch, "loss": losses[-1]})
    return losses, condition_number


@torch.enable_grad()
def _step(student: BlockRun, position: int, target: Batch, optimizer: torch.optim.Optimizer) -> float:
    """Learn from one batch; returns its loss before the step."""
    output_BTH = student.forward(position)
    loss = (
        (_valid(output_BTH, target.mask_BT) - _valid(target.hidden_BTH.to(output_BTH), target.mask_BT)).square().mean()
    )
    value = loss.detach()
    if not bool(value.isfinite()):
        raise _Unstable(f"the loss became {float(value)}")
    optimizer.zero_grad()
    (loss / value.clamp(min=torch.finfo(value.dtype).tiny)).backward()
    optimizer.step()
    return float(value)


def _largest_condition_number(block: nn.Module) -> float:
    if not all(bool(p.isfinite().all()) for parameters in learned_parameters(block) for p in parameters):
        raise _Unstable("a transform or clip became infinite or NaN")
    return max(m.condition_number() for m in block.modules() if isinstance(m, KroneckerTransform))


def _valid(values_BTI: Tensor, mask_BT: Tensor | None) -> Tensor:
    """The rows [N, I] of the tokens that count."""
    return values_BTI.flatten(0, 1) if mask_BT is None else values_BTI[mask_BT.to(values_BTI.device, torch.bool)]
