"""AWQ (arXiv 2306.00978): input channels scaled by how large they are, then ranges clipped, both found by search.

As published (mit-han-lab/llm-awq:awq/quantize/{pre_quant,auto_scale,auto_clip}.py): first s = mean|x|^r for the r of
0, .05 ... .95 that changes the output of the inspected module least, all else being at full precision, on the
full-precision model's activations.  Then, except in q and k, each group's range shrunk by the one of 1, .95 ... .55
that changes the group's share of the output least.

Departure: the r are compared on `search_tokens` tokens, not on all (SmolLM2-135M, blocks 0, 12 and 24: 2,048 tokens
choose what 16,384 do in eight of nine searches, and a loss .3 % above in the ninth); the clipping error, published as a
mean over 512 tokens, is d (mean of x x^T) d^T over all of them, which costs less; an asymmetric range includes zero, as
everywhere here.  AWQ takes a group's minimum and maximum and clamps the zero point to the codes: the same unless a
group's weights have one sign (none of that model's), and then it misses part of the range.

QAT starts from the scaled weights, not clipped, and the frozen grid of the clipped range.

Memory beyond the block: its weights in fp32, x x^T per group, and the inputs and outputs of the searched modules for
the sampled tokens.

Dimensions: N tokens that count, O output features, I input features, G groups, K input features per group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.func import functional_call

from quant.calibration.statistics import exact_products, not_finite
from quant.calibration.streaming import BlockMethod, BlockRun, Call, LinearResult
from quant.decoder import KEY, LINEAR_GROUPS, QUERY
from quant.grids.affine import LinearState, fake_quantize, grouped, minmax_grid
from quant.grids.scheme import Scheme
from quant.methods.options import AWQOptions
from quant.methods.scaling import ScalePair, fold_scale, scale_pairs

Calls = list[tuple[Tensor | None, Call]]
"""Of each sampled batch: the mask of tokens that count, None for all, and the call."""
MIN_CHANNEL_SCALE = 1e-4
CLIP_STEPS, CLIP_STEP = 10, 0.05
NEVER_CLIPPED = (QUERY, KEY)
"""Their errors meet in a product, which a per-layer error does not see (auto_clip.py, `auto_clip_block`)."""


class InputStatistics:
    """Means over the tokens that count: |x|, and within each of `num_groups` groups of input features x x^T."""

    def __init__(self, num_in: int, num_groups: int, device: torch.device | str) -> None:
        group_size = num_in // num_groups
        self._abs_I = torch.zeros(num_in, dtype=torch.float64, device=device)
        self._outer_GKK = torch.zeros(num_groups, group_size, group_size, device=device)
        self._num_tokens = 0

    def add(self, x_NI: Tensor) -> None:
        """Raises ValueError when an input is not finite."""
        num_groups, group_size, _ = self._outer_GKK.shape
        is_bfloat16 = x_NI.dtype is torch.bfloat16
        x_GNK = x_NI.float().view(-1, num_groups, group_size).transpose(0, 1)
        with exact_products(bfloat16_inputs=is_bfloat16):
            self._outer_GKK.baddbmm_(x_GNK.transpose(1, 2), x_GNK)
        self._abs_I += x_NI.abs().sum(0, dtype=torch.float64)
        self._num_tokens += len(x_NI)
        if not bool(self._abs_I.sum().isfinite()):
            raise not_finite(x_NI.dtype)

    @property
    def mean_abs_I(self) -> Tensor:
        return (self._abs_I / self._num_tokens).float()

    @property
    def mean_outer_GKK(self) -> Tensor:
        return self._outer_GKK / self._num_tokens


@dataclass
class Observed:
    """What one forward pass of the block over the calibration set showed."""

    inputs: dict[tuple[str, ...], InputStatistics] = field(default_factory=dict)
    """By group of LINEAR_GROUPS."""
    sample: list[tuple[Tensor | None, dict[str, Call]]] = field(default_factory=list)
    """Of the first batches: the mask of tokens that count, and the calls of the recorded modules."""

    def calls(self, name: str) -> Calls:
        return [(mask_BT, calls[name]) for mask_BT, calls in self.sample]


def awq_blocks(options: AWQOptions) -> BlockMethod:
    """AWQ as a block method; ValueErrors name the block."""

    def quantize(run: BlockRun, scheme: Scheme) -> dict[str, LinearResult]:
        try:
            return _quantize(run, scheme, options)
        except ValueError as error:
            raise ValueError(f"block {run.index}: {error}") from error

    return BlockMethod(quantize, inputs="full_precision")


def _quantize(run: BlockRun, scheme: Scheme, options: AWQOptions) -> dict[str, LinearResult]:
    pairs = scale_pairs(run.block, scale_qkv=options.scale_qkv)
    observed = observe(run, scheme, [pair.inspected for pair in pairs], options.search_tokens)
    # All are searched before any is folded: each search sees the full-precision block.
    ratios = {pair.targets: search_ratio(run, pair, observed, scheme, options.num_ratios) for pair in pairs}
    weights = {name: _at_least_float32(run.linear(name).weight) for group in LINEAR_GROUPS for name in group}
    scales = {group: torch.ones_like(statistics.mean_abs_I) for group, statistics in observed.inputs.items()}
    for pair in pairs:
        scale_I = channel_scale(observed.inputs[pair.targets].mean_abs_I, ratios[pair.targets])
        scales[pair.targets] = fold_scale(run.block, weights, pair, scale_I).float()
    results = {}
    for group, scale_I in scales.items():
        for name, result in _round(group, weights, scale_I, observed, scheme, clip=options.clip).items():
            results[name] = LinearResult(result.state, {"ratio": ratios.get(group, 0.0), **result.report})
            run.replace(name, result.state, scheme)
    return results


def _round(
    group: tuple[str, ...],
    weights: Mapping[str, Tensor],
    scale_I: Tensor,
    observed: Observed,
    scheme: Scheme,
    *,
    clip: bool,
) -> dict[str, LinearResult]:
    """The grids of a group's linears, given their scaled weights and their inputs' scale."""
    outer_GKK = _divided(observed.inputs[group].mean_outer_GKK, scale_I)
    results = {}
    for name in group:
        num_steps = CLIP_STEPS if clip and name not in NEVER_CLIPPED else 0
        state, share_clipped = clip_grid(weights[name].float(), outer_GKK, scheme, num_steps)
        rounded_OI = fake_quantize(state.weight, state.scale, state.zero, scheme, torch.float32)
        error = relative_error(state.weight / scale_I, rounded_OI / scale_I, observed.calls(group[0]))
        results[name] = LinearResult(state, {"error": error, "clipped": share_clipped})
    return results


def observe(run: BlockRun, scheme: Scheme, inspected: Sequence[str], search_tokens: int) -> Observed:
    """Move the batches behind the full-precision block and keep what the searches need of the pass."""
    observed, num_tokens = Observed(), 0
    recorded = {*inspected, *(group[0] for group in LINEAR_GROUPS)}
    for batch, calls in run.advance_recorded(recorded):
        for group in LINEAR_GROUPS:
            x_BTI = calls[group[0]].args[0]
            if group not in observed.inputs:
                num_in = x_BTI.shape[-1]
                observed.inputs[group] = InputStatistics(num_in, scheme.num_groups(num_in), x_BTI.device)
            observed.inputs[group].add(_valid(x_BTI, batch.mask_BT))
        if num_tokens < search_tokens:
            observed.sample.append((batch.mask_BT, calls))
            num_tokens += int(x_BTI[..., 0].numel() if batch.mask_BT is None else batch.mask_BT.sum())
    if not observed.sample:
        raise ValueError("there are no calibration sequences; give a calibration set that is not empty")
    return observed


def channel_scale(mean_abs_I: Tensor, ratio: float) -> Tensor:
    """mean|x|^ratio, at least MIN_CHANNEL_SCALE, with the product of its extremes normalised to 1."""
    scale_I = mean_abs_I.pow(ratio).clamp(min=MIN_CHANNEL_SCALE)
    return scale_I / (scale_I.max() * scale_I.min()).sqrt()


@torch.no_grad()
def search_ratio(run: BlockRun, pair: ScalePair, observed: Observed, scheme: Scheme, num_ratios: int) -> float:
    """The exponent that changes the inspected module's output least in the mean square; of equals the smallest."""
    module, calls = run.block.get_submodule(pair.inspected), observed.calls(pair.inspected)
    mean_abs_I = observed.inputs[pair.targets].mean_abs_I
    best_change, best_ratio = torch.inf, 0.0
    for ratio in (step / num_ratios for step in range(num_ratios)):
        scale_I = channel_scale(mean_abs_I, ratio)
        candidates = {
            f"{name}.weight".removeprefix(f"{pair.inspected}."): _rounded_at(run.linear(name).weight, scale_I, scheme)
            for name in pair.targets
        }
        change = _output_change(module, candidates, calls)
        if change < best_change:
            best_change, best_ratio = change, ratio
    return best_ratio


def _rounded_at(w_OI: Tensor, scale_I: Tensor, scheme: Scheme) -> Tensor:
    """The weights that act on the unscaled input once w * scale is rounded to nearest, in the dtype of w."""
    scaled_OI = w_OI.float() * scale_I
    scale_OG1, zero_OG1 = minmax_grid(grouped(scaled_OI, scheme), scheme)
    rounded_OI = fake_quantize(scaled_OI, scale_OG1.squeeze(-1), zero_OG1.squeeze(-1), scheme, torch.float32)
    return (rounded_OI / scale_I).to(w_OI.dtype)


def _output_change(module: nn.Module, weights: dict[str, Tensor], calls: Calls) -> float:
    """Mean squared difference between what the module gave and what it gives with other `weights`."""
    total, num_values = 0.0, 0
    for mask_BT, call in calls:
        output = functional_call(module, weights, call.args, call.kwargs)
        difference_NO = _valid(_hidden(output), mask_BT).float() - _valid(_hidden(call.output), mask_BT).float()
        total += float(difference_NO.square().sum(dtype=torch.float64))
        num_values += difference_NO.numel()
    return total / num_values


@torch.no_grad()
def clip_grid(w_OI: Tensor, outer_GKK: Tensor, scheme: Scheme, num_steps: int) -> tuple[LinearState, float]:
    """The state with the grid of the clipped range whose error d C d^T is least per group, and the share clipped.

    d is what rounding changes in a group's weights, C [K, K] the mean of x x^T over its inputs.  Of equal errors the
    wider range wins; without steps nothing is clipped.
    """
    w_OGK = grouped(w_OI, scheme)
    most_OG1 = w_OGK.abs().amax(-1, keepdim=True)
    best_scale_OG, best_zero_OG = (part.squeeze(-1) for part in minmax_grid(w_OGK, scheme))
    best_error_OG = torch.full_like(best_scale_OG, torch.inf)
    clipped_OG = torch.zeros_like(best_scale_OG, dtype=torch.bool)
    for step in range(num_steps):
        limit_OG1 = most_OG1 * (1 - step * CLIP_STEP)
        scale_OG, zero_OG = (part.squeeze(-1) for part in minmax_grid(w_OGK.clamp(-limit_OG1, limit_OG1), scheme))
        change_OI = fake_quantize(w_OI, scale_OG, zero_OG, scheme, torch.float32).sub_(w_OI)
        change_GOK = grouped(change_OI, scheme).transpose(0, 1)
        with exact_products(bfloat16_inputs=False):
            error_OG = (change_GOK @ outer_GKK).mul_(change_GOK).sum(-1).T.contiguous()
        better_OG = error_OG < best_error_OG
        best_error_OG = torch.where(better_OG, error_OG, best_error_OG)
        best_scale_OG = torch.where(better_OG, scale_OG, best_scale_OG)
        best_zero_OG = torch.where(better_OG, zero_OG, best_zero_OG)
        clipped_OG |= better_OG & (step > 0)
    return LinearState(w_OI, best_scale_OG, best_zero_OG), float(clipped_OG.float().mean())


@torch.no_grad()
def relative_error(w_OI: Tensor, rounded_OI: Tensor, calls: Calls) -> float:
    """The squared change of a linear's output relative to its squared output, without bias, on the sample."""
    change = output = 0.0
    for mask_BT, call in calls:
        x_NI = _valid(call.args[0], mask_BT)
        change += float((x_NI @ (rounded_OI - w_OI).to(x_NI.dtype).T).float().square().sum(dtype=torch.float64))
        output += float((x_NI @ w_OI.to(x_NI.dtype).T).float().square().sum(dtype=torch.float64))
    return change / output if output > 0 else 0.0


def _divided(outer_GKK: Tensor, scale_I: Tensor) -> Tensor:
    """The mean of (x / s)(x / s)^T from that of x x^T."""
    scale_GK = scale_I.view(outer_GKK.shape[:2])
    return outer_GKK / (scale_GK[:, :, None] * scale_GK[:, None, :])


def _valid(values_BTI: Tensor, mask_BT: Tensor | None) -> Tensor:
    """The rows [N, I] of the tokens that count."""
    return values_BTI.flatten(0, 1) if mask_BT is None else values_BTI[mask_BT.to(values_BTI.device, torch.bool)]


def _hidden(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """An attention module gives its weights too."""
    return output[0] if isinstance(output, tuple) else output


def _at_least_float32(weight: Tensor) -> Tensor:
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
