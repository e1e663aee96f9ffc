"""GPTQ (arXiv 2210.17323; constants as in IST-DASLab/gptq, gptq.py) that keeps what QAT starts from.

Reasoning-QAT starts from the weights "adjusted via Hessian-based compensation prior to quantization" (paper, section
4.1): each column is kept as it is at its turn, before it is rounded, together with the frozen grid it is rounded on.
Rounding that latent weight on that grid gives exactly the codes of GPTQ.

Dimensions: O output features, I input features, G groups, K columns of a block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quant.calibration.statistics import dead_columns, exact_products
from quant.calibration.streaming import BlockMethod, BlockRun, LinearResult
from quant.decoder import LINEAR_GROUPS
from quant.grids.affine import LinearState, fake_quantize, grouped, minmax_grid, mse_grid
from quant.grids.scheme import PER_CHANNEL, Scheme
from quant.methods.options import MAX_DAMPING, GPTQOptions

RETRY_FACTOR = 10.0
"""Growth of the damping from one factorisation to the next (ModelCloud/GPTQModel grows its floor likewise)."""
FIRST_RETRY_DAMPING = 1e-3
"""Damping of the first retry where the one asked for is smaller."""

SMALLEST_HALF = 64
"""Triangular matrices up to this size are inverted whole."""


class HessianError(ValueError):
    """The Hessian could not be factorised within the permitted damping."""


@dataclass(frozen=True)
class GPTQResult:
    """The QAT start of one linear, and how it was reached."""

    state: LinearState
    """The compensated weights before rounding, [O, I], with scale and zero, [O, G]."""
    damping_used: float
    num_retries: int
    error: float
    """Relative output error on the calibration data, tr(D H D^T) / tr(W H W^T) with D = W - dequantized."""
    num_dead: int
    """Input features that were zero in every calibration token; their weights are set to zero."""


def gptq_shared(
    weights: Mapping[str, Tensor], hessian_II: Tensor, scheme: Scheme, options: GPTQOptions
) -> dict[str, GPTQResult]:
    """GPTQ of several linears with the same inputs (q, k, v; up, gate): one factorisation, one column loop.

    The column loop runs in the dtype of the weights, at least fp32; the factorisation is always fp64.  Raises
    HessianError when no permitted damping makes the Hessian positive definite.
    """
    options.check(scheme)
    dtype = torch.promote_types(next(iter(weights.values())).dtype, torch.float32)
    w_OI = torch.cat([w.detach().to(dtype) for w in weights.values()])
    if not bool(torch.isfinite(w_OI).all()):
        raise ValueError("the weights hold infinities or NaN; a quantization grid needs finite weights")
    dead_I = dead_columns(hessian_II)
    order_I = _column_order(hessian_II, dead_I, options.act_order)
    factor_II, damping, num_retries = inverse_factor(hessian_II, dead_I, order_I, options.damping)
    with exact_products(bfloat16_inputs=False):
        state = _compensate(w_OI.masked_fill(dead_I, 0), factor_II.to(dtype), order_I, scheme, options)
        del factor_II
        num_dead, results = int(dead_I.sum()), {}
        sizes = [w.shape[0] for w in weights.values()]
        for name, w, part in zip(weights, w_OI.split(sizes), _split(state, sizes), strict=True):
            rounded_OI = fake_quantize(part.weight, part.scale, part.zero, scheme, torch.float32)
            error = relative_error(w, rounded_OI, hessian_II)
            results[name] = GPTQResult(part, damping, num_retries, error, num_dead)
    return results


def gptq_blocks(options: GPTQOptions) -> BlockMethod:
    """Group by group, each on what the quantized ones before it give; ValueErrors name block and linears."""

    def quantize(run: BlockRun, scheme: Scheme) -> dict[str, LinearResult]:
        results = {}
        for group in LINEAR_GROUPS:
            weights = {name: run.linear(name).weight for name in group}
            try:
                group_results = gptq_shared(weights, run.hessian(group), scheme, options)
            except ValueError as error:
                raise ValueError(f"block {run.index}, {', '.join(group)}: {error}") from error
            for name, result in group_results.items():
                report = {
                    "error": result.error,
                    "damping": result.damping_used,
                    "retries": result.num_retries,
                    "dead_columns": result.num_dead,
                }
                results[name] = LinearResult(result.state, report)
                run.replace(name, result.state, scheme)
        return results

    return BlockMethod(quantize)


def relative_error(w_OI: Tensor, rounded_OI: Tensor, hessian_II: Tensor) -> float:
    """tr(D H D^T) / tr(W H W^T) with D = W - rounded: the squared output error relative to the squared output."""
    difference_OI, hessian_II = w_OI.float() - rounded_OI.float(), hessian_II.float()
    error = ((difference_OI @ hessian_II) * difference_OI).sum(dtype=torch.float64)
    scale = ((w_OI.float() @ hessian_II) * w_OI.float()).sum(dtype=torch.float64)
    return float(error / scale) if scale > 0 else 0.0


def inverse_factor(hessian_II: Tensor, dead_I: Tensor, order_I: Tensor, damping: float) -> tuple[Tensor, float, int]:
    """Return (U, damping used, retries) with U upper triangular in fp64 and U^T U the inverse of the damped Hessian.

    Rows and columns are taken in `order_I`; a dead column gets diagonal 1.  Where the Cholesky factorisation fails, the
    diagonal is restored and the damping grows tenfold, up to MAX_DAMPING; then HessianError.
    """
    # Factorising the matrix in reverse order, P H P = L L^T, gives H = R R^T with R = P L P upper triangular, so that
    # U = R^-1: one factorisation and one triangular inverse, where GPTQ inverts H and factorises the inverse.
    reverse_I = order_I.flip(0)
    matrix_II = hessian_II[reverse_I][:, reverse_I].double()
    diagonal_I = matrix_II.diagonal().masked_fill(dead_I[reverse_I], 1.0)
    mean = diagonal_I.mean()
    for num_retries, tried in enumerate(_dampings(damping)):
        matrix_II.diagonal().copy_(diagonal_I + tried * mean)
        lower_II, info = torch.linalg.cholesky_ex(matrix_II)
        if int(info) == 0 and bool(torch.isfinite(lower_II.diagonal()).all()):
            del matrix_II
            _invert_lower_(lower_II)
            return lower_II.flip(0, 1), tried, num_retries
    raise HessianError(
        f"the Hessian is not positive definite even with {tried:g} times its mean diagonal added "
        f"({num_retries} retries); give more or longer calibration sequences, or use method 'rtn' knowingly"
    )


def _invert_lower_(lower_II: Tensor) -> None:
    """Invert a lower triangular matrix in place, by halves: a third of the work of solving for the identity."""
    size = len(lower_II)
    if size <= SMALLEST_HALF:
        identity_II = torch.eye(size, dtype=lower_II.dtype, device=lower_II.device)
        lower_II.copy_(torch.linalg.solve_triangular(lower_II, identity_II, upper=False))
        return
    first, second = slice(size // 2), slice(size // 2, size)
    _invert_lower_(lower_II[first, first])
    _invert_lower_(lower_II[second, second])
    product_II = lower_II[second, first] @ lower_II[first, first]
    torch.neg(lower_II[second, second] @ product_II, out=lower_II[second, first])


def _dampings(damping: float) -> list[float]:
    """The dampings to try in turn, from the one asked for up to MAX_DAMPING."""
    tried = [damping]
    while (following := max(tried[-1] * RETRY_FACTOR, FIRST_RETRY_DAMPING)) <= MAX_DAMPING * (1 + 1e-9):
        tried.append(following)
    return tried


def _column_order(hessian_II: Tensor, dead_I: Tensor, act_order: bool) -> Tensor:
    diagonal_I = hessian_II.diagonal().masked_fill(dead_I, 1.0)
    if act_order:
        return torch.argsort(diagonal_I, descending=True, stable=True)
    return torch.arange(len(diagonal_I), device=diagonal_I.device)


def _compensate(w_OI: Tensor, factor_II: Tensor, order_I: Tensor, scheme: Scheme, options: GPTQOptions) -> LinearState:
    """Run the column loop on w_OI; `factor_II` is in the order of the columns, the state in the original order."""
    num_out, num_in = w_OI.shape
    num_groups = scheme.num_groups(num_in)
    if options.static_groups:
        scale_GO, zero_GO = _grid(w_OI, scheme, options.mse_clip)
    else:
        scale_GO, zero_GO = (torch.empty(num_groups, num_out, device=w_OI.device) for _ in range(2))
    groups = (order_I // (num_in // num_groups)).tolist()
    columns_IO = w_OI.T[order_I]
    _column_loop(columns_IO, factor_II, scale_GO, zero_GO, groups, scheme, options)
    latent_OI = columns_IO[torch.argsort(order_I)].T.contiguous()
    return LinearState(latent_OI, scale_GO.T.contiguous(), zero_GO.T.contiguous())


def _column_loop(
    columns_IO: Tensor,
    factor_II: Tensor,
    scale_GO: Tensor,
    zero_GO: Tensor,
    groups: list[int],
    scheme: Scheme,
    options: GPTQOptions,
) -> None:
    """Replace each column (a row of columns_IO) by its compensated value before rounding.

    A column is brought up to date when its turn comes, from the errors of its own block (one matrix-vector product);
    earlier blocks have been applied to all later columns at once.  Without static groups this fills the grid as well.
    """
    num_in, num_out = columns_IO.shape
    group_size, one_group = num_in // scale_GO.shape[0], replace(scheme, group_size=PER_CHANNEL)
    pivots = factor_II.diagonal().tolist()
    error_KO = columns_IO.new_empty(min(options.block_size, num_in), num_out)
    for start in range(0, num_in, options.block_size):
        stop = min(start + options.block_size, num_in)
        within_KK = factor_II[start:stop, start:stop].T.contiguous()
        for i in range(start, stop):
            k, group, w_O = i - start, groups[i], columns_IO[i]
            if not options.static_groups and i % group_size == 0:
                members = slice(i, i + group_size)
                # The group's columns as they are now: those of this block still lack this block's errors.
                pending_IO = columns_IO[members] - factor_II[start:i, members].T @ error_KO[:k]
                scale_1O, zero_1O = _grid(pending_IO.T, one_group, options.mse_clip)
                scale_GO[group], zero_GO[group] = scale_1O[0], zero_1O[0]
            if k:
                w_O.addmv_(error_KO[:k].T, within_KK[k, :k], alpha=-1)
            _rounding_error(w_O, scale_GO[group], zero_GO[group], scheme, out_O=error_KO[k]).div_(pivots[i])
        if stop < num_in:
            columns_IO[stop:].addmm_(factor_II[start:stop, stop:].T, error_KO[: stop - start], alpha=-1)


def _rounding_error(w_O: Tensor, scale_O: Tensor, zero_O: Tensor, scheme: Scheme, *, out_O: Tensor) -> Tensor:
    """w - s * (q - z) into out_O, with the arithmetic of quant.grids.affine, operation for operation."""
    torch.div(w_O, scale_O, out=out_O).round_().add_(zero_O).clamp_(scheme.qmin, scheme.qmax)
    return torch.sub(w_O, out_O.sub_(zero_O).mul_(scale_O), out=out_O)


def _grid(w_OI: Tensor, scheme: Scheme, mse_clip: bool) -> tuple[Tensor, Tensor]:
    """(scale_GO, zero_GO) of the groups of w_OI, contiguous along O."""
    scale_OG1, zero_OG1 = (mse_grid if mse_clip else minmax_grid)(grouped(w_OI, scheme), scheme)
    return scale_OG1.squeeze(-1).T.contiguous(), zero_OG1.squeeze(-1).T.contiguous()


def _split(state: LinearState, sizes: list[int]) -> list[LinearState]:
    parts = zip(*(tensor.split(sizes) for tensor in (state.weight, state.scale, state.zero)), strict=True)
    return [LinearState(*(tensor.clone() for tensor in part)) for part in parts]
