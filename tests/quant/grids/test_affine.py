"""Fake quantization against plain scalar references in float64, and its properties.

Dimensions as in quant/grids/affine.py: O output features, I input features, G groups per row, K weights per group.
"""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quant.grids import affine
from quant.grids.affine import fake_quantize, grouped, minmax_grid, mse_grid, quantize, snap_grid
from quant.grids.scheme import ScaleRule, Scheme

# bf16 keeps 8 significant bits: rounding to it moves a value by at most 2^-8 of itself.
BF16_ROUNDING = 2.0**-8

SCHEMES = [
    Scheme.parse("W3G8"),
    Scheme.parse("W2G8"),
    Scheme.parse("W3G8", scale_rule="full_range"),
    Scheme.parse("W3G8", symmetric=False),
    Scheme.parse("W2G8", symmetric=False),
    Scheme.parse("W4", symmetric=False),
    Scheme.parse("W8G8"),
    Scheme.parse("W3G8", symmetric=False, scale_dtype="float32"),
]
scheme_cases = pytest.mark.parametrize("scheme", SCHEMES, ids=str)
quick = settings(max_examples=25, deadline=None, derandomize=True)


def dequantize(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    return (codes.float() - zero) * scale


def bf16(value: float) -> float:
    return torch.tensor(value, dtype=torch.float64).to(torch.bfloat16).item()


def random_weights(seed: int, num_out: int = 3, num_in: int = 16, shift: float = 0.1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_out, num_in, generator=generator) * 0.05 + shift * 0.05


@st.composite
def weights_and_scheme(draw: st.DrawFn, max_bits: int = 7) -> tuple[Tensor, Scheme]:
    symmetric = draw(st.booleans())
    rule: ScaleRule = "full_range" if symmetric and draw(st.booleans()) else "paper"
    scheme = Scheme(draw(st.integers(2, max_bits)), draw(st.sampled_from([4, 8, -1])), symmetric, rule)
    w_OI = random_weights(draw(st.integers(0, 2**31)), shift=draw(st.sampled_from([-3.0, 0.0, 0.5, 3.0])))
    w_OI *= draw(st.sampled_from([1e-6, 1.0, 1e3]))
    w_OI[:, draw(st.integers(0, 15))] *= draw(st.sampled_from([0.0, 1.0, 20.0]))
    return w_OI, scheme


def grid_of(w_OI: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    scale_OG1, zero_OG1 = minmax_grid(grouped(w_OI, scheme), scheme)
    return scale_OG1.squeeze(-1), zero_OG1.squeeze(-1)


def stretched_grid_of(w_OI: Tensor, scheme: Scheme, stretch: float) -> tuple[Tensor, Tensor]:
    scale_OG, zero_OG = grid_of(w_OI, scheme)
    return snap_grid(scale_OG * stretch, zero_OG * stretch, scheme)


def reference_grid(group: list[float], scheme: Scheme) -> tuple[float, int]:
    """Paper, Eq. 1 and the lines below it, group by group; full_range: the factor of IST-DASLab/gptq."""
    if scheme.symmetric:
        largest = max(abs(w) for w in group)
        scale = largest / (2 ** (scheme.bits - 1) - 1)
        if scheme.scale_rule == "full_range":
            scale = 2 * largest / (2**scheme.bits - 1)
        return bf16(scale), 0
    low, high = min(*group, 0.0), max(*group, 0.0)
    scale = (high - low) / (2**scheme.bits - 1)
    if scheme.scale_dtype == "bfloat16":
        scale = bf16(scale)
    return scale, round(-low / scale)


def reference_fake_quantize(w_OI: Tensor, scheme: Scheme) -> list[list[float]]:
    rows: list[list[float]] = []
    for row in w_OI.double().tolist():
        size = len(row) if scheme.group_size == -1 else scheme.group_size
        rows.append([])
        for start in range(0, len(row), size):
            scale, zero = reference_grid(row[start : start + size], scheme)
            for w in row[start : start + size]:
                code = min(max(round(w / scale) + zero, scheme.qmin), scheme.qmax)
                rows[-1].append(bf16(scale * (code - zero)))
    return rows


@scheme_cases
@pytest.mark.parametrize("seed", range(3))
def test_equals_equation_1_as_a_scalar_loop(scheme: Scheme, seed: int) -> None:
    w_OI = random_weights(seed)
    actual = fake_quantize(w_OI, *grid_of(w_OI, scheme), scheme)
    assert actual.dtype == torch.bfloat16
    assert torch.equal(actual.double(), torch.tensor(reference_fake_quantize(w_OI, scheme), dtype=torch.float64))


@pytest.mark.parametrize(
    ("options", "published"),
    [({}, 0.0751), ({"scale_rule": "full_range"}, 0.0564), ({"symmetric": False}, 0.0465)],
)
def test_gaussian_error_of_the_three_conventions_at_3_bits(options: dict, published: float) -> None:
    """Relative error of round-to-nearest, N(0, 1), groups of 128: conventions differ by over a third."""
    scheme = Scheme.parse("W3G128", **options)
    w_OGK = torch.randn(1024, 8, 128, generator=torch.Generator().manual_seed(0))
    grid = minmax_grid(w_OGK, scheme)
    error = (dequantize(quantize(w_OGK, *grid, scheme), *grid) - w_OGK).square().mean().item()
    assert error == pytest.approx(published, rel=0.01)


def test_full_range_is_gptqs_unsigned_grid_with_the_mid_point_zero() -> None:
    scheme = Scheme.parse("W3G8", scale_rule="full_range", scale_dtype="float32")
    w_OGK = grouped(random_weights(0), scheme)
    scale_OG1, zero_OG1 = minmax_grid(w_OGK, scheme)
    codes_OGK = torch.clamp(torch.round(w_OGK / scale_OG1) + 4, 0, 7)
    assert (zero_OG1 == 0).all()
    assert torch.equal(quantize(w_OGK, scale_OG1, zero_OG1, scheme), codes_OGK - 4)


@quick
@given(weights_and_scheme())
def test_codes_and_fake_quantization_agree(case: tuple[Tensor, Scheme]) -> None:
    w_OI, scheme = case
    scale_OG, zero_OG = grid_of(w_OI, scheme)
    codes_OGK = quantize(grouped(w_OI, scheme), scale_OG[..., None], zero_OG[..., None], scheme)
    assert codes_OGK.dtype == scheme.code_dtype
    assert scheme.qmin <= codes_OGK.min() and codes_OGK.max() <= scheme.qmax
    plain_OI = dequantize(codes_OGK, scale_OG[..., None], zero_OG[..., None]).view_as(w_OI)
    assert torch.equal(plain_OI.to(torch.bfloat16), fake_quantize(w_OI, scale_OG, zero_OG, scheme))


@quick
@given(weights_and_scheme(), st.floats(0.3, 3.0))
def test_idempotent_at_a_fixed_grid(case: tuple[Tensor, Scheme], stretch: float) -> None:
    """Up to 7 bits, where bf16 rounding of s * (q - z) moves it by less than half a step."""
    w_OI, scheme = case
    scale_OG, zero_OG = stretched_grid_of(w_OI, scheme, stretch)
    once_OI = fake_quantize(w_OI, scale_OG, zero_OG, scheme)
    assert torch.equal(fake_quantize(once_OI.float(), scale_OG, zero_OG, scheme), once_OI)


@quick
@given(weights_and_scheme(max_bits=8), st.floats(0.3, 1.5))
def test_error_is_at_most_half_a_step_inside_the_range(case: tuple[Tensor, Scheme], stretch: float) -> None:
    w_OI, scheme = case
    scale_OG, zero_OG = stretched_grid_of(w_OI, scheme, stretch)
    w_OGK, scale_OG1, zero_OG1 = (
        grouped(w_OI, scheme).double(),
        scale_OG.double()[..., None],
        zero_OG[..., None],
    )
    low_OG1, high_OG1 = scale_OG1 * (scheme.qmin - zero_OG1), scale_OG1 * (scheme.qmax - zero_OG1)
    inside_OGK = (w_OGK >= low_OG1) & (w_OGK <= high_OG1)
    out_OGK = grouped(fake_quantize(w_OI, scale_OG, zero_OG, scheme), scheme).double()
    # Half a step, plus the final rounding to bf16, plus float32 rounding of w / s next to a tie.
    bound_OGK = scale_OG1 * (0.5 + 1e-4) + out_OGK.abs() * BF16_ROUNDING
    assert ((out_OGK - w_OGK).abs() <= bound_OGK)[inside_OGK].all()
    nearest_end_OGK = w_OGK.clamp(low_OG1, high_OG1)
    assert ((out_OGK - nearest_end_OGK).abs() <= bound_OGK).all()


@quick
@given(weights_and_scheme(), st.integers(0, 99))
def test_permuting_groups_or_weights_permutes_the_result(case: tuple[Tensor, Scheme], seed: int) -> None:
    w_OI, scheme = case
    w_OGK = grouped(w_OI, scheme)
    groups = torch.randperm(w_OGK.shape[1], generator=torch.Generator().manual_seed(seed))
    inner = torch.randperm(w_OGK.shape[2], generator=torch.Generator().manual_seed(seed))
    mixed_OI = w_OGK[:, groups][..., inner].reshape(w_OI.shape)
    mixed_out_OGK = grouped(fake_quantize(mixed_OI, *grid_of(mixed_OI, scheme), scheme), scheme)
    out_OGK = grouped(fake_quantize(w_OI, *grid_of(w_OI, scheme), scheme), scheme)
    assert torch.equal(mixed_out_OGK, out_OGK[:, groups][..., inner])


@quick
@given(weights_and_scheme(max_bits=8))
def test_zero_is_a_level(case: tuple[Tensor, Scheme]) -> None:
    """Also of groups whose weights all lie on one side, because the range is widened to include zero."""
    w_OI, scheme = case
    grid = grid_of(w_OI, scheme)
    for make_grid in (minmax_grid, mse_grid):
        scale_OG1, zero_OG1 = make_grid(grouped(w_OI, scheme), scheme)
        assert torch.equal(zero_OG1, zero_OG1.round())
        assert scheme.qmin <= zero_OG1.min() <= zero_OG1.max() <= scheme.qmax
        assert torch.equal(scale_OG1, scale_OG1.to(scheme.torch_scale_dtype).float())
    assert not fake_quantize(torch.zeros_like(w_OI), *grid, scheme).any()


@scheme_cases
@pytest.mark.parametrize("value", [0.0, 0.03, -0.03, 1e-40, 1e30])
def test_constant_groups_stay_finite(scheme: Scheme, value: float) -> None:
    w_OI = torch.full((2, 16), value, requires_grad=True)
    for make_grid in (minmax_grid, mse_grid):
        scale_OG1, zero_OG1 = make_grid(grouped(w_OI.detach(), scheme), scheme)
        out_OI = fake_quantize(w_OI, scale_OG1.squeeze(-1), zero_OG1.squeeze(-1), scheme, torch.float32)
        (gradient,) = torch.autograd.grad(out_OI.sum(), w_OI)
        assert (scale_OG1 > 0).all() and gradient.isfinite().all()
        # The full range ends half a step past its last level; 1e-40 is zero at the least bf16 scale, 1e-38.
        rtol = 0.15 if scheme.scale_rule == "full_range" else 0.02
        torch.testing.assert_close(out_OI, w_OI.detach(), rtol=rtol, atol=1e-39)


@pytest.mark.parametrize("scheme", [Scheme.parse("W3G4"), Scheme.parse("W3G4", symmetric=False)], ids=str)
def test_gradients_equal_finite_differences_of_the_straight_through_function(scheme: Scheme) -> None:
    """In float64, scalar by scalar: rounding adds a constant (STE), and a clipped code is a constant."""
    w_OI = random_weights(5, num_out=4, num_in=8)
    scale_OG, zero_OG = grid_of(w_OI, scheme)
    scale_OG, zero_OG = snap_grid(scale_OG * 0.6, zero_OG, scheme)  # a narrow grid, to clip some codes
    upstream_OI = random_weights(6, num_out=4, num_in=8)

    def straight_through(point: list[float], at: list[float]) -> float:
        (w, scale, zero), (w0, scale0, zero0) = point, at
        code = round(w0 / scale0) + zero0
        if scheme.qmin <= code <= scheme.qmax:
            return scale * ((w / scale + (round(w0 / scale0) - w0 / scale0) + zero) - zero)
        return scale * (min(max(code, scheme.qmin), scheme.qmax) - zero)

    expected = [torch.zeros(tensor.shape, dtype=torch.float64) for tensor in (w_OI, scale_OG, zero_OG)]
    num_clipped = 0
    for row in range(4):
        for column in range(8):
            group = column // 4
            at = [w_OI[row, column].item(), scale_OG[row, group].item(), zero_OG[row, group].item()]
            num_clipped += not scheme.qmin <= round(at[0] / at[1]) + at[2] <= scheme.qmax
            for which, index in enumerate((column, group, group)):
                step = 1e-6 * max(abs(at[1]), 1e-3)
                up, down = ([v + sign * step * (k == which) for k, v in enumerate(at)] for sign in (1, -1))
                slope = (straight_through(up, at) - straight_through(down, at)) / (2 * step)
                expected[which][row, index] += slope * upstream_OI[row, column].item()

    w_OI, scale_OG, zero_OG = (tensor.clone().requires_grad_() for tensor in (w_OI, scale_OG, zero_OG))
    out_OI = fake_quantize(w_OI, scale_OG, zero_OG, scheme, torch.float32)
    actual = torch.autograd.grad(out_OI, (w_OI, scale_OG, zero_OG), upstream_OI)
    assert 8 < num_clipped < 24
    for actual_part, expected_part in zip(actual, expected, strict=True):
        torch.testing.assert_close(actual_part.double(), expected_part, rtol=1e-4, atol=1e-6)


@quick
@given(weights_and_scheme(), st.floats(0.2, 2.0))
def test_gradient_passes_exactly_where_clipping_left_the_code(case: tuple[Tensor, Scheme], stretch: float) -> None:
    w_OI, scheme = case
    scale_OG, zero_OG = stretched_grid_of(w_OI, scheme, stretch)
    w_OI.requires_grad_()
    upstream_OI = torch.randn(w_OI.shape, generator=torch.Generator().manual_seed(1))
    out_OI = fake_quantize(w_OI, scale_OG, zero_OG, scheme, torch.float32)
    (gradient,) = torch.autograd.grad(out_OI, w_OI, upstream_OI)
    code_OGK = torch.round(grouped(w_OI.detach(), scheme) / scale_OG[..., None]) + zero_OG[..., None]
    kept_OI = ((code_OGK >= scheme.qmin) & (code_OGK <= scheme.qmax)).view_as(w_OI)
    assert torch.equal(gradient, upstream_OI * kept_OI)


@pytest.mark.parametrize("scheme", [SCHEMES[0], SCHEMES[-1]], ids=str)
def test_the_mask_never_fires_on_the_weights_own_range(scheme: Scheme) -> None:
    """Though w / s can exceed Qmax by rounding of the scale (first case) or of the zero (second case)."""
    w_OI = random_weights(0, num_out=64, num_in=64).requires_grad_()
    fake_quantize(w_OI, *grid_of(w_OI.detach(), scheme), scheme).sum().backward()
    assert w_OI.grad is not None and w_OI.grad.eq(1).all()


def test_compute_dtype_carries_gradients_unrounded() -> None:
    scheme = Scheme.parse("W3G8")
    w_OI = random_weights(0).requires_grad_()
    scale_OG, zero_OG = grid_of(w_OI.detach(), scheme)
    out_OI = fake_quantize(w_OI, scale_OG, zero_OG, scheme, torch.float32)
    assert torch.equal(out_OI, fake_quantize(w_OI, scale_OG, zero_OG, scheme).float())
    out_OI.backward(torch.full_like(out_OI, 1 + 2.0**-20))
    assert w_OI.grad is not None and w_OI.grad.eq(1 + 2.0**-20).all()


def test_backward_keeps_no_tensor_of_the_weights_size() -> None:
    scheme = Scheme.parse("W3G8")
    w_OI = random_weights(0).requires_grad_()
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        fake_quantize(w_OI, *grid_of(w_OI.detach(), scheme), scheme)
    assert [t.data_ptr() == w_OI.data_ptr() for t in saved if t.shape == w_OI.shape] == [True]


def reference_mse_group(group: list[float], scheme: Scheme) -> tuple[float, int]:
    """IST-DASLab/gptq:quant.py find_params(mse), group by group in float64."""
    best = (float("inf"), 0.0, 0)
    for step in range(80):
        scale, zero = reference_grid([w * (1 - step / 100) for w in group], scheme)
        error = 0.0
        for w in group:
            code = min(max(round(w / scale) + zero, scheme.qmin), scheme.qmax)
            error += abs(scale * (code - zero) - w) ** 2.4
        best = min(best, (error, scale, zero), key=lambda candidate: candidate[0])
    return best[1:]


@pytest.mark.parametrize("scheme", [SCHEMES[0], SCHEMES[2], SCHEMES[3], SCHEMES[4]], ids=str)
def test_mse_grid_equals_a_scalar_search(scheme: Scheme) -> None:
    w_OGK = grouped(random_weights(2), scheme)
    scale_OG1, zero_OG1 = mse_grid(w_OGK, scheme)
    for row in range(3):
        for group in range(2):
            expected = reference_mse_group(w_OGK[row, group].double().tolist(), scheme)
            assert (scale_OG1[row, group].item(), zero_OG1[row, group].item()) == expected


@scheme_cases
def test_mse_grid_is_never_worse_than_the_range_and_free_of_its_chunks(
    scheme: Scheme, monkeypatch: pytest.MonkeyPatch
) -> None:
    w_OGK = grouped(random_weights(3, num_out=4, num_in=32), scheme)
    errors = []
    for make_grid in (mse_grid, minmax_grid):
        grid = make_grid(w_OGK, scheme)
        errors.append((dequantize(quantize(w_OGK, *grid, scheme), *grid) - w_OGK).abs().pow(2.4).sum(-1))
    assert (errors[0] <= errors[1] * (1 + 1e-6)).all() and errors[0].sum() < 0.99 * errors[1].sum()
    whole = mse_grid(w_OGK, scheme)
    monkeypatch.setattr(affine, "CLIP_CHUNK_CPU", 24)
    assert all(torch.equal(a, b) for a, b in zip(whole, mse_grid(w_OGK, scheme), strict=True))


@pytest.mark.parametrize("scheme", [Scheme.parse("W3G64", symmetric=False), Scheme.parse("W2G32"), Scheme(4)], ids=str)
@pytest.mark.parametrize("tails", [1, 5])
def test_groups_left_out_of_the_search_would_not_have_won(
    scheme: Scheme, tails: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With outliers too: as good as the grids of searching every group to the end (equal errors may tie)."""
    w_OGK = grouped(random_weights(4, num_out=40, num_in=192) * 20, scheme) ** tails
    grids = [mse_grid(w_OGK, scheme)]
    monkeypatch.setattr(affine, "CLIP_SLACK", 1e9)
    grids.append(mse_grid(w_OGK, scheme))
    pruned_OG, full_OG = (
        (dequantize(quantize(w_OGK, *grid, scheme), *grid) - w_OGK).double().abs().pow(2.4).sum(-1) for grid in grids
    )
    torch.testing.assert_close(pruned_OG, full_OG, rtol=1e-6, atol=0)


def test_most_steps_of_the_search_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    searched = []
    original = affine._clip_error

    def counting(w: Tensor, *grid_and_scheme: Any) -> Tensor:
        error = original(w, *grid_and_scheme)
        searched.append(error.numel())
        return error

    monkeypatch.setattr(affine, "_clip_error", counting)
    w_OGK = torch.randn(64, 4, 64, generator=torch.Generator().manual_seed(0))
    mse_grid(w_OGK, Scheme.parse("W3G64", symmetric=False))
    assert sum(searched) < 0.6 * affine.NUM_CLIP_STEPS * w_OGK.numel()


def test_snap_grid_makes_any_trained_grid_usable() -> None:
    scheme = Scheme.parse("W3G8", symmetric=False)
    scale, zero = snap_grid(torch.tensor([-1.0, 0.0, 1 / 3]), torch.tensor([-2.0, 3.6, 9.0]), scheme)
    assert zero.tolist() == [0.0, 4.0, 7.0]
    assert (scale > 0).all() and scale[2] == bf16(1 / 3)


def test_a_scale_trained_below_zero_gives_no_nan() -> None:
    scheme = Scheme.parse("W3G8", symmetric=False)
    w_OI = random_weights(0).requires_grad_()
    scale_OG, zero_OG = (torch.full((3, 2), value, requires_grad=True) for value in (-0.1, 3.0))
    out_OI = fake_quantize(w_OI, scale_OG, zero_OG, scheme, torch.float32)
    gradients = torch.autograd.grad(out_OI.sum(), (w_OI, scale_OG, zero_OG))
    assert out_OI.isfinite().all() and all(gradient.isfinite().all() for gradient in gradients)


def test_grouped_refuses_a_group_size_that_does_not_divide() -> None:
    with pytest.raises(ValueError, match="group sizes that work: 32, -1"):
        grouped(torch.zeros(2, 96), Scheme.parse("W3G64"))
