"""Dynamic fake quantization against a scalar loop and against autograd of the published formula."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quant.grids import chunks
from quant.grids.dynamic import DynamicGrid, dynamic_fake_quantize, dynamic_grid

GRIDS = {
    "asymmetric": DynamicGrid(4),
    "asymmetric 2 bits": DynamicGrid(2),
    "symmetric": DynamicGrid(4, symmetric=True),
    "clamped symmetric": DynamicGrid(3, symmetric=True, clamp=True),
    "clamped asymmetric": DynamicGrid(4, clamp=True),
    "bf16 scales": DynamicGrid(4, symmetric=True, clamp=True, scale_dtype=torch.bfloat16),
}
grids = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
FACTORS = {"none": None, "shared": (0.8, 0.7), "per row": "rows"}
factor_kinds = pytest.mark.parametrize("kind", FACTORS)


def rows(num_rows: int = 6, size: int = 16, dtype: torch.dtype = torch.float64) -> Tensor:
    x = torch.randn(num_rows, size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x[1] = x[1].abs()  # a row that is widened to include zero
    x[2] = -x[2].abs()
    return x.to(dtype)


def factors_of(kind: str, x: Tensor) -> Tensor | None:
    if kind == "none":
        return None
    if kind == "shared":
        return torch.tensor(FACTORS["shared"], dtype=x.dtype)
    return torch.rand(*x.shape[:-1], 2, generator=torch.Generator().manual_seed(4), dtype=x.dtype) * 0.5 + 0.45


def scalar_reference(x: Tensor, grid: DynamicGrid, factors: Tensor | None) -> Tensor:
    """Value by value in Python floats, after the definitions in `DynamicGrid`."""
    out = torch.empty_like(x)
    for i in range(x.shape[0]):
        row = x[i].tolist()
        low_factor, high_factor = (
            (1.0, 1.0) if factors is None else (factors if factors.ndim == 1 else factors[i]).tolist()
        )
        low, high = min(0.0, *row) * low_factor, max(0.0, *row) * high_factor
        scale = max(-low, high) / grid.qmax if grid.symmetric else (high - low) / grid.qmax
        scale = (
            float(torch.tensor(scale, dtype=torch.float64).to(grid.scale_dtype).double())
            if grid.scale_dtype is torch.bfloat16
            else scale
        )
        zero = 0 if grid.symmetric else round(-low / scale)
        for k, value in enumerate(row):
            value = min(max(value, low), high) if grid.clamp else value
            code = min(max(round(value / scale) + zero, grid.qmin), grid.qmax)
            out[i, k] = scale * (code - zero)
    return out


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, grad):
        return grad


def autograd_reference(x: Tensor, grid: DynamicGrid, factors: Tensor | None) -> Tensor:
    """The published formula with a straight-through round, differentiated by autograd."""
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    if factors is not None:
        low, high = low * factors[..., :1], high * factors[..., 1:]
    scale = (torch.maximum(-low, high) if grid.symmetric else high - low) / grid.qmax
    zero = torch.zeros_like(scale) if grid.symmetric else (-low / scale).detach().round()
    clamped = torch.minimum(torch.maximum(x, low), high) if grid.clamp else x
    codes = (_Round.apply(clamped / scale) + zero).clamp(grid.qmin, grid.qmax)
    return scale * (codes - zero)


@grids
@factor_kinds
def test_values_are_those_of_a_scalar_loop(grid: DynamicGrid, kind: str) -> None:
    x = rows()
    factors = factors_of(kind, x)
    torch.testing.assert_close(
        dynamic_fake_quantize(x, grid, factors), scalar_reference(x, grid, factors), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("grid", [g for g in GRIDS.values() if g.scale_dtype == torch.float32], ids=str)
@factor_kinds
def test_gradients_are_those_of_the_formula(grid: DynamicGrid, kind: str) -> None:
    x = rows()
    factors = factors_of(kind, x)
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(5), dtype=x.dtype)
    found, expected = [], []
    for function, gradients in ((dynamic_fake_quantize, found), (autograd_reference, expected)):
        leaves = [x.clone().requires_grad_()] + ([] if factors is None else [factors.clone().requires_grad_()])
        (function(leaves[0], grid, leaves[1] if factors is not None else None) * weight).sum().backward()
        gradients.extend(leaf.grad for leaf in leaves)
    for ours, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-10)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, grid = rows(40), DynamicGrid(4)
    factors = factors_of("per row", x)
    gradients, values = [], []
    for limit in (2**19, 400):
        monkeypatch.setattr(chunks, "CHUNK_BYTES_CPU", limit)
        leaves = x.clone().requires_grad_(), factors.clone().requires_grad_()
        out = dynamic_fake_quantize(*(leaves[0], grid, leaves[1]))
        out.square().sum().backward()
        values.append(out.detach())
        gradients.append([leaf.grad for leaf in leaves])
    assert torch.equal(*values)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_shapes_and_dtypes_are_kept() -> None:
    x = torch.randn(2, 3, 5, 8, dtype=torch.bfloat16, requires_grad=True)
    out = dynamic_fake_quantize(x, DynamicGrid(4))
    out.sum().backward()
    assert out.shape == x.shape and out.dtype == x.dtype and x.grad is not None and x.grad.dtype == torch.bfloat16
    in_float32 = dynamic_fake_quantize(x.detach().float(), DynamicGrid(4))
    assert torch.equal(out.detach(), in_float32.to(torch.bfloat16))


def test_rows_of_zeros_stay_zero_with_zero_gradient_for_factors() -> None:
    factors = torch.tensor([0.5, 0.5], requires_grad=True)
    out = dynamic_fake_quantize(torch.zeros(2, 8), DynamicGrid(4), factors)
    out.sum().backward()
    assert torch.equal(out.detach(), torch.zeros(2, 8)) and torch.equal(factors.grad, torch.zeros(2))


@grids
def test_grid_is_the_one_in_use(grid: DynamicGrid) -> None:
    x = rows()
    factors = factors_of("per row", x)
    scale_N1, zero_N1 = dynamic_grid(x, grid, factors)
    codes = dynamic_fake_quantize(x, grid, factors) / scale_N1 + zero_N1
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-9)
    assert grid.qmin - 1e-9 <= float(codes.min()) and float(codes.max()) <= grid.qmax + 1e-9


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=2, max_size=24), st.sampled_from([2, 3, 4, 8]), st.booleans())
def test_error_is_at_most_a_step_and_zero_is_kept(values: list[float], bits: int, symmetric: bool) -> None:
    x, grid = torch.tensor([[0.0, *values]], dtype=torch.float64), DynamicGrid(bits, symmetric)
    scale_N1, _ = dynamic_grid(x, grid)
    out = dynamic_fake_quantize(x, grid)
    assert float(out[0, 0]) == 0
    # Half a step, and up to half another where the rounded zero point pushed an end of the range out.
    assert float((out - x).abs().max()) <= float(scale_N1) * (1 + 1e-9) if float(x.abs().max()) > 1e-30 else True


def test_permuting_a_row_permutes_the_result() -> None:
    x = rows()
    order = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(0))
    for grid, kind in itertools.product(GRIDS.values(), ("none", "shared")):
        factors = factors_of(kind, x)
        assert torch.equal(
            dynamic_fake_quantize(x[:, order], grid, factors), dynamic_fake_quantize(x, grid, factors)[:, order]
        )
