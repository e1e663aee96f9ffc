"""FlatQuant (arXiv 2410.09426): affine transforms and clips learned block by block, so that little is lost by rounding.

As published (ruikangliu/FlatQuant: flatquant/{train_utils,trans_utils,flat_linear}.py and model_tools/qwen_utils.py): a
decoder layer gets Kronecker transforms with per-channel scales for the inputs of q/k/v, up/gate and down, a transform
over heads for o_proj's, one over a head's values and one over its keys, and learned clipping of weights (per output
channel), of activations, keys and values (two factors each).  Weights are rounded to nearest and stay as they are.
QAT starts from these, latent weights in the model's own basis, and learns transforms and clips on.

Transforms are inverted directly, in float64, which is what the published Qwen scripts use; there is no parametrisation
by singular values, whose solves fail in low precision (FlatQuant's issues 5, 13 and 20) and whose orthogonal factors
cost more than the inverse of matrices this small.  Instead the condition number is watched (quant/flatquant_training).

Departure: v_proj's clipping acts on the weights as they are rounded, behind the value transform; published before it.

Dimensions: O output features, I input features, D head size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace

import torch
from torch import Tensor, nn

from quant.calibration.streaming import BlockMethod, BlockRun, LinearResult
from quant.decoder import ATTENTION, DOWN, INPUT_SITES, MLP, OUTPUT
from quant.grids.affine import LinearState, rtn
from quant.grids.scheme import Scheme
from quant.methods.flatquant_training import Calibration, calibrate, float_copy, observe
from quant.methods.options import FlatQuantOptions
from quant.student.linear import QuantLinear, linear_states, prepare, quantized_linears
from quant.student.site_tensors import build_sites, folded_tensors, online_tensors, site_tensors
from quant.student.sites import (
    DOWN_SCALE,
    VALUE_TRANSFORM,
    Clip,
    InputQuantizer,
    KVQuantizer,
    LayerSites,
    attach,
)
from quant.student.targets import target_linears
from quant.transforms.kronecker import KroneckerTransform, balanced_factors

DIAGONAL_EXPONENT = 0.3
"""d = max|w|^(1 - a) / max|x|^a (FlatQuant's `diag_alpha`)."""
MIN_DIAGONAL = 1e-5
CLIP_LOGIT = 4.0
"""Clipping starts at sigmoid(4) = .982 of the range."""
SEED_STRIDE = 1_000_003
"""Keeps the blocks of different seeds apart."""
BLOCK = "block"


def flatquant_blocks(options: FlatQuantOptions) -> BlockMethod:
    """FlatQuant as a block method; ValueErrors name the block."""

    def quantize(run: BlockRun, scheme: Scheme) -> dict[str, LinearResult]:
        try:
            learned, calibration = _calibrated(run, scheme, options)
        except ValueError as error:
            raise ValueError(f"block {run.index}: {error}") from error
        run.advance()
        return _finished(run, learned, calibration, scheme)

    return BlockMethod(quantize, inputs="full_precision", learned_transforms=True)


def _calibrated(run: BlockRun, scheme: Scheme, options: FlatQuantOptions) -> tuple[nn.Module, Calibration]:
    """The quantized block in float32 with what it learned."""
    targets, max_inputs = observe(run)
    seed = options.seed * SEED_STRIDE + run.index

    def start() -> nn.Module:
        block = float_copy(run.block)
        return learnable(block, scheme, initial_sites(block, scheme, max_inputs, seed))

    return calibrate(start, run, targets, options)


def learnable(block: nn.Module, scheme: Scheme, sites: LayerSites) -> nn.Module:
    """The float32 `block`, prepared in place as QAT prepares a model, with `sites` and open weight clips to learn."""
    model = nn.ModuleDict({BLOCK: block})
    states = {name: _clipped(linear.weight, scheme) for name, linear in target_linears(model).items()}
    prepare(model, scheme, states, "recomputed", {BLOCK: sites})
    return block


def _clipped(w_OI: Tensor, scheme: Scheme) -> LinearState:
    state = rtn(w_OI, scheme)
    return replace(state, clip=torch.full((*state.scale.shape, 2), CLIP_LOGIT, device=w_OI.device))


def initial_sites(block: nn.Module, scheme: Scheme, max_inputs: Mapping[str, Tensor], seed: int) -> LayerSites:
    """Random orthogonal transforms, scales from `max_inputs` (by site: the largest |x| per channel), open clips."""
    generator = torch.Generator().manual_seed(seed)
    device = next(block.parameters()).device

    def orthogonal(size: int) -> Tensor:
        q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
        return (q * r.diagonal().sign()).float().contiguous().to(device)

    def learned(*parts: Tensor | None) -> KroneckerTransform:
        return KroneckerTransform(*parts, learned=True)

    def clip() -> Clip:
        return Clip(torch.full((2,), CLIP_LOGIT, device=device), learned=True)

    def kronecker(site: str, diagonal_I: Tensor | None) -> KroneckerTransform:
        left, right = balanced_factors(len(max_inputs[site]))
        return learned(orthogonal(left), orthogonal(right), diagonal_I)

    scales = {site: _initial_scale(block, site, max_I) for site, max_I in max_inputs.items()}
    head_dim = int(block.get_submodule(ATTENTION).head_dim)  # type: ignore[arg-type]
    num_heads = block.get_submodule(OUTPUT).in_features // head_dim  # type: ignore[operator]
    transforms = {
        ATTENTION: kronecker(ATTENTION, scales[ATTENTION]),
        OUTPUT: learned(orthogonal(int(num_heads))),
        MLP: kronecker(MLP, scales[MLP]),
        DOWN: kronecker(DOWN, None),
    }
    inputs = {site: InputQuantizer(scheme.activation_bits, transforms[site], clip()) for site in INPUT_SITES}
    kv = None
    if scheme.kv_bits is not None:
        kv = KVQuantizer(scheme.kv_bits, learned(None, orthogonal(head_dim)), clip(), clip())
    between = {
        VALUE_TRANSFORM: learned(None, orthogonal(head_dim)),
        DOWN_SCALE: learned(None, None, scales[DOWN]),
    }
    return LayerSites(inputs, kv, between)


def _initial_scale(block: nn.Module, site: str, max_input_I: Tensor) -> Tensor:
    weights = [block.get_parameter(f"{name}.weight") for name in INPUT_SITES[site]]
    max_weight_I = torch.cat([weight_OI.abs() for weight_OI in weights]).amax(0).float()
    scale_I = max_weight_I.pow(1 - DIAGONAL_EXPONENT) / max_input_I.clamp(min=MIN_DIAGONAL).pow(DIAGONAL_EXPONENT)
    return scale_I.detach().clamp(min=MIN_DIAGONAL)


@torch.no_grad()
def _finished(run: BlockRun, learned: nn.Module, calibration: Calibration, scheme: Scheme) -> dict[str, LinearResult]:
    """Fold what was learned into `run.block`, and keep in `run.further` what training goes on from."""
    linears = dict(quantized_linears(learned))
    for name, make in folded_tensors(learned):
        parameter = run.block.get_parameter(name)
        original = parameter.clone()
        parameter.copy_(make())
        if name.removesuffix(".weight") not in linears and not parameter.equal(original):
            run.further[name] = original
    run.further.update(site_tensors(learned))
    online = {f"{BLOCK}.{name}": tensor for name, tensor in online_tensors(learned).items()}
    attach(run.block, build_sites(online, scheme, [BLOCK], learned=False)[BLOCK])
    return {
        name: LinearResult(state, {"error": _rounding_error(linears[name]), **asdict(calibration)})
        for name, state in linear_states(learned).items()
    }


def _rounding_error(linear: QuantLinear) -> float:
    """The squared change of the transformed weights by clipping and rounding, relative to their square."""
    weight_OI = linear.weight_in_basis()
    return float((linear.rounded_weight(torch.float32) - weight_OI).square().sum() / weight_OI.square().sum())
