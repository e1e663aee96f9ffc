"""Dynamic fake quantization: every row gets the grid of its own range, in every forward pass.

Rows are tokens (the inputs of a linear), a token of one head (keys, values) or, with learned clipping, the output
channels of a weight. The range can be shrunken by learned factors, FlatQuant's LAC and LWC (ruikangliu/FlatQuant:
flatquant/quant_utils.py), so the gradient passes through minimum, maximum and scale.

Dimensions: N rows, K values of a row. Computed in float32, or in float64 where the input is float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from quant.grids.chunks import row_chunks
from quant.grids.scheme import code_range


@dataclass(frozen=True)
class DynamicGrid:
    """How the grid of a row follows from its range.

    Asymmetric: s = (high - low) / (2^b - 1), z = round(-low / s), codes 0 .. 2^b - 1. Symmetric: s = max(-low, high) /
    (2^(b-1) - 1), z = 0 (the "paper" rule of quant/grids/scheme.py).
    """

    bits: int
    symmetric: bool = False
    clamp: bool = False
    """Clamp the values to the shrunken range first, as FlatQuant does with weights."""
    scale_dtype: torch.dtype = torch.float32
    """The dtype in which scales are stored; they are rounded to it before use."""

    @property
    def covers_range(self) -> bool:
        """Whether no code is ever clipped: the clamped range's larger end is the last code, up to 8 bits even where
        the scale was rounded to bf16; an asymmetric grid is moved by the rounding of its zero."""
        return self.symmetric and self.clamp

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


@torch.no_grad()
def dynamic_values(
    x: Tensor, grid: DynamicGrid, factors: Tensor | None, stored_dtype: torch.dtype, dtype: torch.dtype
) -> Tensor:
    """The values of `dynamic_fake_quantize`, rounded to `stored_dtype` and given as `dtype`."""
    out_NK = x.new_empty((x.shape[:-1].numel(), x.shape[-1]), dtype=dtype)
    for rows, x_NK, factors_N2 in _chunks(x, factors):
        range_ = _Range(x_NK, factors_N2)
        scale_N1, zero_N1 = _grid_of(range_, grid)
        codes_NK = _clamped(x_NK, range_, grid).div(scale_N1).round_()
        if not grid.covers_range:
            codes_NK.add_(zero_N1).clamp_(grid.qmin, grid.qmax).sub_(zero_N1)
        out_NK[rows] = codes_NK.mul_(scale_N1).to(stored_dtype)
    return out_NK.view(x.shape)


@torch.no_grad()
def dynamic_gradients(
    x: Tensor, grid: DynamicGrid, factors: Tensor | None, grad: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Gradients of x and of the factors, in their dtypes, where `grad` [..., K] is that of `dynamic_fake_quantize`."""
    grad_NK = grad.reshape(-1, x.shape[-1])
    grad_x_NK = x.new_empty(grad_NK.shape)
    grad_factors = []
    for rows, x_NK, factors_N2 in _chunks(x, factors):
        grad_x_NK[rows], grad_factors_N2 = _backward_rows(x_NK, factors_N2, grad_NK[rows].to(x_NK.dtype), grid)
        grad_factors.append(grad_factors_N2)
    return grad_x_NK.view(x.shape), None if factors is None else _reduced(torch.cat(grad_factors), factors)


class _DynamicFakeQuantize(torch.autograd.Function):
    """Keeps its input only, and computes codes again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factors: Tensor | None, grid: DynamicGrid) -> Tensor:
        ctx.save_for_backward(x, factors)
        ctx.grid = grid
        return dynamic_values(x, grid, factors, x.dtype, x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, factors = ctx.saved_tensors
        return *dynamic_gradients(x, ctx.grid, factors, grads[0]), None


class _Range:
    """Minimum and maximum of each row, widened to include zero, and shrunken by the factors."""

    def __init__(self, x_NK: Tensor, factors_N2: Tensor | None) -> None:
        # Not torch.aminmax, which takes ten times as long over one dimension on a CPU (measured).
        self.min_N1 = x_NK.amin(-1, keepdim=True).clamp_(max=0)
        self.max_N1 = x_NK.amax(-1, keepdim=True).clamp_(min=0)
        factors_N2 = x_NK.new_ones(2) if factors_N2 is None else factors_N2.to(x_NK.dtype)
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

    Masks are floats, compared into floats: on a CPU boolean ones and torch.where take four to twenty times as long
    (measured).
    """
    range_ = _Range(x_NK, factors_N2)
    scale_N1, zero_N1 = _grid_of(range_, grid)
    clamped_NK = _clamped(x_NK, range_, grid)
    ratio_NK = clamped_NK / scale_N1
    codes_NK = ratio_NK.round()
    if grid.covers_range:
        slope_NK, grad_x_NK = codes_NK.sub_(ratio_NK), grad_NK
    else:
        preclip_NK = codes_NK.add_(zero_N1)
        codes_NK = preclip_NK.clamp(grid.qmin, grid.qmax)
        inside_NK = torch.eq(preclip_NK, codes_NK, out=preclip_NK)
        # d out / d scale = code - zero - x / scale, without the last term where the code was clipped.
        slope_NK = codes_NK.sub_(zero_N1).addcmul_(ratio_NK, inside_NK, value=-1)
        grad_x_NK = inside_NK.mul_(grad_NK)
    grad_low_N1, grad_high_N1 = _range_gradients(slope_NK.mul_(grad_NK).sum(-1, keepdim=True), range_, grid)
    if grid.clamp:
        side_NK = torch.sub(x_NK, clamped_NK, out=clamped_NK).sign_()  # -1 below the range, 1 above
        above_less_below_N1 = torch.mul(side_NK, grad_x_NK, out=slope_NK).sum(-1, keepdim=True)
        grad_outside_NK = side_NK.square_().mul_(grad_x_NK)
        outside_N1 = grad_outside_NK.sum(-1, keepdim=True)
        grad_low_N1 = grad_low_N1 + (outside_N1 - above_less_below_N1) / 2
        grad_high_N1 = grad_high_N1 + (outside_N1 + above_less_below_N1) / 2
        grad_x_NK = torch.sub(grad_x_NK, grad_outside_NK, out=ratio_NK)
    mask_NK = slope_NK
    _add_at_extreme(grad_x_NK, x_NK, range_.min_N1, grad_low_N1 * range_.low_factor, mask_NK)
    _add_at_extreme(grad_x_NK, x_NK, range_.max_N1, grad_high_N1 * range_.high_factor, mask_NK)
    return grad_x_NK, torch.cat([grad_low_N1 * range_.min_N1, grad_high_N1 * range_.max_N1], -1)


def _add_at_extreme(grad_x_NK: Tensor, x_NK: Tensor, extreme_N1: Tensor, grad_N1: Tensor, mask_NK: Tensor) -> None:
    """Give the row's extreme value its gradient; equal ones share, as in torch.amax, and a widened range has none.

    Writes into grad_x_NK, and over mask_NK.
    """
    torch.eq(x_NK, extreme_N1, out=mask_NK)
    count_N1 = mask_NK.sum(-1, keepdim=True).clamp_(min=1)
    grad_x_NK.addcmul_(mask_NK, grad_N1 * extreme_N1.sign().abs_() / count_N1)


def _range_gradients(grad_scale_N1: Tensor, range_: _Range, grid: DynamicGrid) -> tuple[Tensor, Tensor]:
    """Gradients of low and high through the scale."""
    grad_N1 = grad_scale_N1 / grid.qmax
    if not grid.symmetric:
        return -grad_N1, grad_N1
    high_rules_N1 = range_.high_N1 >= -range_.low_N1
    return torch.where(high_rules_N1, 0, -grad_N1), torch.where(high_rules_N1, grad_N1, 0)


def _chunks(x: Tensor, factors: Tensor | None) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """(rows, x_NK in the dtype computed in, factors_N2 or None); the factors broadcast over rows if shared."""
    x_NK = x.reshape(-1, x.shape[-1])
    dtype = torch.promote_types(x.dtype, torch.float32)
    per_row = None if factors is None or factors.ndim == 1 else factors.reshape(-1, 2)
    for rows in row_chunks(len(x_NK), x.shape[-1] * dtype.itemsize, x.device):
        yield rows, x_NK[rows].to(dtype), factors if per_row is None else per_row[rows]


def _reduced(grad_N2: Tensor, factors: Tensor) -> Tensor:
    """The factors' gradient in their own shape and dtype: summed over rows where they are shared."""
    return (grad_N2.sum(0) if factors.ndim == 1 else grad_N2.view(factors.shape)).to(factors.dtype)
