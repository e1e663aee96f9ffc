"""Dynamic fake quantization: every row gets the grid of its own range, in every forward pass.

Rows are tokens (the inputs of a linear), a token of one head (keys, values) or, with learned clipping, the output
channels of a weight. The range can be shrunken by learned factors, FlatQuant's LAC and LWC (ruikangliu/FlatQuant:
flatquant/quant_utils.py), so the gradient passes through minimum, maximum and scale.

Dimensions: N rows, K values of a row. Computed in float32, or in float64 where the input is float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from quant.scheme import code_range

# Values that a pass works on at a time: the float32 temporaries of a chunk stay in a CPU core's cache.
CHUNK_CPU = 2**17
CHUNK_ACCELERATOR = 2**28


@dataclass(frozen=True)
class DynamicGrid:
    """How the grid of a row follows from its range.

    Asymmetric: s = (high - low) / (2^b - 1), z = round(-low / s), codes 0 .. 2^b - 1. Symmetric: s = max(-low, high) /
    (2^(b-1) - 1), z = 0 (the "paper" rule of quant/scheme.py).
    """

    bits: int
    symmetric: bool = False
    clamp: bool = False
    """Clamp the values to the shrunken range first, as FlatQuant does with weights."""
    scale_dtype: torch.dtype = torch.float32
    """The dtype in which scales are stored; they are rounded to it before use."""

    @property
    def qmin(self) -> int:
        return code_range(self.bits, self.symmetric)[0]

    @property
    def qmax(self) -> int:
        return code_range(self.bits, self.symmetric)[1]


def dynamic_fake_quantize(x: Tensor, grid: DynamicGrid, factors: Tensor | None = None) -> Tensor:
    """Quantize and dequantize x [..., K], each row on the grid of its own range; the dtype of x is kept.

    `factors` [2], or [..., 2] with the leading dimensions of x, multiply minimum and maximum (both widened to include
    zero). Backward is that of the formula with the straight-through estimator for the rounding of codes and scales,
    the zero point being constant: a value's gradient passes where it was not clipped, and minimum, maximum and factors
    get theirs through the scale (and, with `clamp`, from the values clamped to them).
    """
    return _DynamicFakeQuantize.apply(x, factors, grid)


@torch.no_grad()
def dynamic_grid(x: Tensor, grid: DynamicGrid, factors: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(scale, zero) [..., 1] that `dynamic_fake_quantize` uses for the rows of x [..., K]; zeros are integers."""
    parts = [_grid_of(_Range(x_NK, factors_N2), grid) for _, x_NK, factors_N2 in _chunks(x, factors)]
    scale_N1, zero_N1 = (torch.cat(columns) for columns in zip(*parts, strict=True))
    return scale_N1.view(*x.shape[:-1], 1), zero_N1.view(*x.shape[:-1], 1)


class _DynamicFakeQuantize(torch.autograd.Function):
    """Keeps its input only, and computes codes again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factors: Tensor | None, grid: DynamicGrid) -> Tensor:
        ctx.save_for_backward(x, factors)
        ctx.grid = grid
        out_NK = torch.empty_like(x.reshape(-1, x.shape[-1]))
        for rows, x_NK, factors_N2 in _chunks(x, factors):
            range_ = _Range(x_NK, factors_N2)
            scale_N1, zero_N1 = _grid_of(range_, grid)
            codes_NK = _clamped(x_NK, range_, grid).to(scale_N1.dtype, copy=True)
            codes_NK.div_(scale_N1).round_().add_(zero_N1).clamp_(grid.qmin, grid.qmax)
            out_NK[rows] = codes_NK.sub_(zero_N1).mul_(scale_N1)
        return out_NK.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, factors = ctx.saved_tensors
        grad_NK = grads[0].reshape(-1, x.shape[-1])
        grad_x_NK = torch.empty_like(grad_NK)
        grad_factors: list[Tensor] | None = [] if ctx.needs_input_grad[1] else None
        for rows, x_NK, factors_N2 in _chunks(x, factors):
            grad_x, grad_factors_N2 = _backward_rows(x_NK, factors_N2, grad_NK[rows], ctx.grid)
            grad_x_NK[rows] = grad_x
            if grad_factors is not None:
                grad_factors.append(grad_factors_N2)
        grad_x_out = grad_x_NK.view(x.shape).to(x.dtype) if ctx.needs_input_grad[0] else None
        return grad_x_out, _reduced(grad_factors, factors), None


class _Range:
    """Minimum and maximum of each row, widened to include zero, and shrunken by the factors."""

    def __init__(self, x_NK: Tensor, factors_N2: Tensor | None) -> None:
        dtype = torch.promote_types(x_NK.dtype, torch.float32)
        # Not torch.aminmax, which takes ten times as long over one dimension on a CPU (measured).
        self.min_N1 = x_NK.amin(-1, keepdim=True).to(dtype).clamp_(max=0)
        self.max_N1 = x_NK.amax(-1, keepdim=True).to(dtype).clamp_(min=0)
        factors_N2 = x_NK.new_ones(2, dtype=dtype) if factors_N2 is None else factors_N2.to(dtype)
        self.low_factor, self.high_factor = factors_N2[..., :1], factors_N2[..., 1:]
        self.low_N1, self.high_N1 = self.min_N1 * self.low_factor, self.max_N1 * self.high_factor


def _grid_of(range_: _Range, grid: DynamicGrid) -> tuple[Tensor, Tensor]:
    if grid.symmetric:
        span_N1 = torch.maximum(-range_.low_N1, range_.high_N1) / grid.qmax
    else:
        span_N1 = (range_.high_N1 - range_.low_N1) / grid.qmax
    dtype = span_N1.dtype
    if grid.scale_dtype != torch.float32:
        span_N1 = span_N1.to(grid.scale_dtype).to(dtype)
    # A row of zeros is zero on any grid.
    scale_N1 = torch.where(span_N1 > torch.finfo(torch.float32).tiny, span_N1, 1.0)
    zero_N1 = torch.zeros_like(scale_N1) if grid.symmetric else (-range_.low_N1 / scale_N1).round_()
    return scale_N1, zero_N1


def _clamped(x_NK: Tensor, range_: _Range, grid: DynamicGrid) -> Tensor:
    return torch.minimum(torch.maximum(x_NK, range_.low_N1), range_.high_N1) if grid.clamp else x_NK


def _backward_rows(
    x_NK: Tensor, factors_N2: Tensor | None, grad_NK: Tensor, grid: DynamicGrid
) -> tuple[Tensor, Tensor]:
    """Gradients of the rows, and of their factors.

    Masks are floats, compared in place: on a CPU boolean ones and torch.where take four to twenty times as long
    (measured).
    """
    range_ = _Range(x_NK, factors_N2)
    scale_N1, zero_N1 = _grid_of(range_, grid)
    x_NK, grad_NK = x_NK.to(scale_N1.dtype), grad_NK.to(scale_N1.dtype)
    ratio_NK = _clamped(x_NK, range_, grid) / scale_N1
    preclip_NK = ratio_NK.round().add_(zero_N1)
    codes_NK = preclip_NK.clamp(grid.qmin, grid.qmax)
    inside_NK = preclip_NK.eq_(codes_NK)
    # d out / d scale = code - zero - x / scale, without the last term where the code was clipped.
    slope_NK = codes_NK.sub_(zero_N1).addcmul_(ratio_NK, inside_NK, value=-1)
    grad_scale_N1 = slope_NK.mul_(grad_NK).sum(-1, keepdim=True)
    grad_x_NK = inside_NK.mul_(grad_NK)
    grad_low_N1, grad_high_N1 = _range_gradients(grad_scale_N1, range_, grid)
    if grid.clamp:
        below_NK, above_NK = (range_.low_N1 - x_NK).gt_(0), (x_NK - range_.high_N1).gt_(0)
        grad_low_N1 = grad_low_N1 + (grad_x_NK * below_NK).sum(-1, keepdim=True)
        grad_high_N1 = grad_high_N1 + (grad_x_NK * above_NK).sum(-1, keepdim=True)
        grad_x_NK.mul_(below_NK.add_(above_NK).neg_().add_(1))
    _add_at_extreme(grad_x_NK, x_NK, range_.min_N1, grad_low_N1 * range_.low_factor)
    _add_at_extreme(grad_x_NK, x_NK, range_.max_N1, grad_high_N1 * range_.high_factor)
    return grad_x_NK, torch.cat([grad_low_N1 * range_.min_N1, grad_high_N1 * range_.max_N1], -1)


def _add_at_extreme(grad_x_NK: Tensor, x_NK: Tensor, extreme_N1: Tensor, grad_N1: Tensor) -> None:
    """Give the row's extreme value its gradient; equal ones share, as in torch.amax, and a widened range has none."""
    at_extreme_NK = (x_NK - extreme_N1).eq_(0)
    count_N1 = at_extreme_NK.sum(-1, keepdim=True).clamp_(min=1)
    grad_x_NK.addcmul_(at_extreme_NK, grad_N1 * extreme_N1.sign().abs_() / count_N1)


def _range_gradients(grad_scale_N1: Tensor, range_: _Range, grid: DynamicGrid) -> tuple[Tensor, Tensor]:
    """Gradients of low and high through the scale."""
    grad_N1 = grad_scale_N1 / grid.qmax
    if not grid.symmetric:
        return -grad_N1, grad_N1
    high_rules_N1 = range_.high_N1 >= -range_.low_N1
    return torch.where(high_rules_N1, 0, -grad_N1), torch.where(high_rules_N1, grad_N1, 0)


def _chunks(x: Tensor, factors: Tensor | None) -> Any:
    """(rows, x_NK, factors_N2 or None) for runs of rows that fit a chunk; the factors broadcast over rows if shared."""
    x_NK = x.reshape(-1, x.shape[-1])
    per_row = factors is not None and factors.ndim > 1
    factors_N2 = factors.reshape(-1, 2) if per_row and factors is not None else factors
    limit = CHUNK_CPU if x.device.type == "cpu" else CHUNK_ACCELERATOR
    step = max(1, limit // max(1, x.shape[-1]))
    for start in range(0, x_NK.shape[0], step):
        rows = slice(start, start + step)
        yield rows, x_NK[rows], factors_N2[rows] if per_row and factors_N2 is not None else factors_N2


def _reduced(grads: list[Tensor] | None, factors: Tensor | None) -> Tensor | None:
    """The factors' gradient in their own shape: summed over rows where they are shared."""
    if grads is None or factors is None:
        return None
    grad_N2 = torch.cat(grads)
    return (grad_N2.sum(0) if factors.ndim == 1 else grad_N2.view(factors.shape)).to(factors.dtype)
