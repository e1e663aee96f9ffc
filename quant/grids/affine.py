"""Affine quantization: finding a grid of scales and zeros, rounding to it, training through the rounding.

Dimensions: O output features, I input features, G groups per row, K weights per group (I = G * K), N = O * G.
Everything is computed in float32. Scales are float32 tensors whose values are exact in the scheme's
`scale_dtype`; zeros are float32 tensors that hold integers. The conventions are those of scheme.py.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from quant.grids.scheme import Scheme

# The dtype in which a checkpoint holds its dequantized weights. The student computes with weights rounded to
# it, so that the saved folder is bit-equal to the student.
CHECKPOINT_DTYPE = torch.bfloat16
# The scale of a group whose weights are all zero. Its codes are zero whatever the scale; one keeps 0/s finite
# and the group alive: a tiny scale would clip, and so mask, the first non-zero weight put there.
DEAD_GROUP_SCALE = 1.0
# The clipping search of IST-DASLab/gptq:quant.py (maxshrink .8, grid 100, norm 2.4), QRM's `--w_clip`.
NUM_CLIP_STEPS = 80
CLIP_STEP = 0.01
CLIP_ERROR_NORM = 2.4
# Weights that the search holds at a time: enough to fill an accelerator, few enough to stay in a CPU's cache.
CLIP_CHUNK_ACCELERATOR = 2**24
CLIP_CHUNK_CPU = 2**15
# Steps between two looks at which groups can still improve.
CLIP_STRIDE = 8
# Above the rounding error of the same weight's error computed twice, by vector and by scalar instructions.
CLIP_SLACK = 1e-5


@dataclass(frozen=True)
class LinearState:
    """A quantized linear, as a PTQ method hands it to training and as a checkpoint keeps it."""

    weight: Tensor  # [O, I] float32, latent: before rounding
    scale: Tensor  # [O, G], exact in the scheme's scale dtype
    zero: Tensor  # [O, G] float32, integers
    clip: Tensor | None = None  # [O, G, 2] float32, logits of learned clipping factors (quant.student.sites.Clip)


def grouped(w_OI: Tensor, scheme: Scheme) -> Tensor:
    """w_OI [O, I] seen as w_OGK [O, G, K]; ValueError if the group size does not divide I."""
    num_out, num_in = w_OI.shape
    num_groups = scheme.num_groups(num_in)
    return w_OI.reshape(num_out, num_groups, num_in // num_groups)


def minmax_grid(w_OGK: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """(scale_OG1, zero_OG1) that cover every weight of the group (round-to-nearest; paper, Eq. 1)."""
    return _grid_of_range(*_range(w_OGK), scheme)


def rtn(w_OI: Tensor, scheme: Scheme) -> LinearState:
    """The latent weights are w_OI [O, I] itself, in float32; ValueError if a weight is not finite."""
    if not w_OI.is_meta and not w_OI.isfinite().all():
        raise ValueError("the weights hold infinities or NaN; a quantization grid needs finite weights")
    scale_OG1, zero_OG1 = minmax_grid(grouped(w_OI.detach(), scheme), scheme)
    return LinearState(w_OI.detach().float(), scale_OG1.squeeze(-1), zero_OG1.squeeze(-1))


@torch.no_grad()
def mse_grid(w_OGK: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """(scale_OG1, zero_OG1) of the range shrunken by 1, .99 ... .21 with the least sum |w - s(q - z)|^2.4.

    Of equal errors the wider range wins. Works through the groups in chunks, so that memory stays bounded.
    """
    num_out, num_groups, group_size = w_OGK.shape
    w_NK = w_OGK.reshape(-1, group_size)
    chunk = CLIP_CHUNK_CPU if w_NK.device.type == "cpu" else CLIP_CHUNK_ACCELERATOR
    parts = [_clip_search(part_NK.float(), scheme) for part_NK in w_NK.split(max(1, chunk // group_size))]
    scale_N, zero_N = (torch.cat(columns) for columns in zip(*parts, strict=True))
    return scale_N.view(num_out, num_groups, 1), zero_N.view(num_out, num_groups, 1)


def quantize(w: Tensor, scale: Tensor, zero: Tensor, scheme: Scheme) -> Tensor:
    """Integer codes (`scheme.code_dtype`) of w; scale and zero broadcast (w_OGK, scale_OG1; w_O, scale_O)."""
    return _preclip_codes(w, scale, zero).clamp_(scheme.qmin, scheme.qmax).to(scheme.code_dtype)


def snap_grid(scale: Tensor, zero: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """The grid as stored and used: scale positive and exact in its dtype, zero an integer among the codes."""
    return _stored(scale.float(), scheme), zero.float().round().clamp_(scheme.qmin, scheme.qmax)


def fake_quantize(
    w_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor, scheme: Scheme, compute_dtype: torch.dtype | None = None
) -> Tensor:
    """Quantize and dequantize w_OI [O, I]; the result is rounded to bf16 and then given as `compute_dtype`.

    `compute_dtype` (default bf16) only says in which dtype the rounded values, and so the incoming gradients,
    travel. scale_OG and zero_OG pass through `snap_grid` and get gradients if they require them.

    Backward: the straight-through estimator of paper section 2.2: a weight's gradient passes where its code
    before clipping lies in [Qmin, Qmax]. For the grid, LSQ (arXiv 1902.08153, Eq. 3), extended by the zero:
    d/ds = q - z - w/s and d/dz = 0 where the gradient passes, q - z and -s elsewhere.

    Departure: the paper writes the mask on W/s. Like clamp(round_ste(W/s) + z) in ruikangliu/FlatQuant:
    flatquant/quant_utils.py, this one tests round(W/s) + z and so masks exactly what clipping changed. They
    differ within half a step beyond the last level, where rounding scale and zero can put a group's extreme.
    """
    return _FakeQuantize.apply(w_OI, scale_OG, zero_OG, scheme, compute_dtype or CHECKPOINT_DTYPE)


class _FakeQuantize(torch.autograd.Function):
    """Keeps references to its inputs only, and computes the mask again in backward: no memory per weight."""

    @staticmethod
    def forward(
        ctx: Any, w_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor, scheme: Scheme, compute_dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(w_OI, scale_OG, zero_OG)
        ctx.scheme = scheme
        scale_OG1, zero_OG1 = snap_grid(scale_OG.unsqueeze(-1), zero_OG.unsqueeze(-1), scheme)
        w_OGK = _preclip_codes(grouped(w_OI, scheme), scale_OG1, zero_OG1).clamp_(scheme.qmin, scheme.qmax)
        return w_OGK.sub_(zero_OG1).mul_(scale_OG1).view_as(w_OI).to(CHECKPOINT_DTYPE).to(compute_dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        w_OI, scale_OG, zero_OG = ctx.saved_tensors
        scheme, (needs_w, needs_scale, needs_zero) = ctx.scheme, ctx.needs_input_grad[:3]
        scale_OG1, zero_OG1 = snap_grid(scale_OG.unsqueeze(-1), zero_OG.unsqueeze(-1), scheme)
        w_OGK, grad_OGK = grouped(w_OI, scheme), grouped(grads[0], scheme)
        preclip_OGK = _preclip_codes(w_OGK, scale_OG1, zero_OG1)
        codes_OGK = preclip_OGK.clamp(scheme.qmin, scheme.qmax)
        # 1.0 or 0.0, as floats: on a CPU torch.where and boolean masks take four to twenty times as long (measured).
        inside_OGK = preclip_OGK.eq_(codes_OGK)
        grad_w = grad_scale = grad_zero = None
        if needs_scale:
            slope_OGK = codes_OGK.sub_(zero_OG1).sub_((w_OGK.float() * inside_OGK).div_(scale_OG1))
            grad_scale = slope_OGK.mul_(grad_OGK).sum(-1).to(scale_OG.dtype)
        passed_OGK = inside_OGK.mul_(grad_OGK)
        if needs_zero:
            sum_OG1 = (grad_OGK.float() - passed_OGK).sum(-1, keepdim=True)
            grad_zero = (-scale_OG1 * sum_OG1).view_as(zero_OG).to(zero_OG.dtype)
        if needs_w:
            grad_w = passed_OGK.view_as(w_OI).to(w_OI.dtype)
        return grad_w, grad_scale, grad_zero, None, None


def _preclip_codes(w: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """round(w / s) + z in float32, a new tensor. Ties go to the even code, as torch.round does everywhere."""
    return w.float().div(scale).round_().add_(zero)


def _range(w_OGK: Tensor) -> tuple[Tensor, Tensor]:
    """(low_OG1, high_OG1) of each group, widened to include zero."""
    # Not torch.aminmax, which takes ten times as long over one dimension on a CPU (measured).
    low_OG1, high_OG1 = w_OGK.amin(-1, keepdim=True), w_OGK.amax(-1, keepdim=True)
    return low_OG1.float().clamp_(max=0), high_OG1.float().clamp_(min=0)


def _grid_of_range(low: Tensor, high: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """(scale, zero) for weights from low <= 0 to high >= 0, elementwise; formulas in scheme.py."""
    if scheme.symmetric:
        levels = scheme.qmax if scheme.scale_rule == "paper" else (2**scheme.bits - 1) / 2
        wanted = torch.maximum(-low, high).div_(levels)
    else:
        wanted = (high - low).div_(2**scheme.bits - 1)
    scale = _stored(wanted.masked_fill_(wanted == 0, DEAD_GROUP_SCALE), scheme)
    if scheme.symmetric:
        return scale, torch.zeros_like(scale)
    # Clamped because rounding the scale can push round(-min/s) past the last code, and zero must stay exact.
    return scale, (-low / scale).round_().clamp_(scheme.qmin, scheme.qmax)


def _stored(scale: Tensor, scheme: Scheme) -> Tensor:
    """The float32 values that `scale` has once stored; what is too small gets the least normal number."""
    dtype = scheme.torch_scale_dtype
    return scale.clamp(min=torch.finfo(dtype).tiny).to(dtype).float()


def _clip_search(w_NK: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """(scale_N, zero_N) of the least error; S is the number of steps, A groups are those still searched.

    A group's error is at least that of its two extremes, which clipping hits first. Once no narrower range can
    come below the best error found, the group is left out: the result is that of the full search.
    """
    low_N1, high_N1 = _range(w_NK)
    low_N, high_N = low_N1.squeeze(-1), high_N1.squeeze(-1)
    keep_S1 = torch.tensor([[1 - step * CLIP_STEP] for step in range(NUM_CLIP_STEPS)], device=w_NK.device)
    scale_SN, zero_SN = _grid_of_range(low_N * keep_S1, high_N * keep_S1, scheme)
    floor_SN = torch.maximum(*(_clip_error(end_N, scale_SN, zero_SN, scheme) for end_N in (low_N, high_N)))
    error_SN = torch.full_like(scale_SN, torch.inf)
    for start in range(0, NUM_CLIP_STEPS, CLIP_STRIDE):
        best_N, reachable_N = error_SN.amin(0) * (1 + CLIP_SLACK), floor_SN[start:].amin(0)
        alive_A = (reachable_N <= best_N).nonzero().squeeze(-1)
        w_KA = w_NK[alive_A].T.contiguous()  # groups side by side: their scales and zeros then need no broadcasting
        scale_S1A, zero_S1A = (grid_SN[start : start + CLIP_STRIDE, None, alive_A] for grid_SN in (scale_SN, zero_SN))
        error_SKA = _clip_error(w_KA, scale_S1A, zero_S1A, scheme)
        error_SN[start : start + CLIP_STRIDE, alive_A] = error_SKA.sum(1)
    best_1N = error_SN.argmin(0, keepdim=True)  # the first of equal ones
    return scale_SN.gather(0, best_1N).squeeze(0), zero_SN.gather(0, best_1N).squeeze(0)


def _clip_error(w: Tensor, scale: Tensor, zero: Tensor, scheme: Scheme) -> Tensor:
    """|w - s(q - z)|^2.4 elementwise, where q is the code of w; a new tensor."""
    # Codes less their zero, which is exact. The power in base two takes a third less time than pow (measured on a CPU).
    levels = (w / scale).round_().clamp_(scheme.qmin - zero, scheme.qmax - zero)
    error = torch.addcmul(w, levels, scale, value=-1, out=levels)
    return error.square_().log2_().mul_(CLIP_ERROR_NORM / 2).exp2_()
