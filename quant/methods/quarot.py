"""QuaRot: rotations that spread outliers, in the weights where they can be and online where not (arXiv 2404.00456).

With Q a random-sign Hadamard matrix of the hidden size and H_n the Hadamard matrix of order n, all orthonormal:

- in the weights: norms move into the linears behind them, the residual stream is rotated by Q (embeddings, head, and
  every linear that reads or writes it), values by H of the head size, head by head, which o_proj undoes;
- online: heads are mixed before o_proj, so that it sees H_heads kron H_head_dim of its input; the input of down_proj
  is rotated by H of the intermediate size; keys are quantized in the basis H_head_dim, after RoPE and after Qwen3's
  k_norm, and brought back (`sites.KVQuantizer`), which is the same as rotating queries and keys. Where no H_heads
  is known (9 heads, or 14), heads are not mixed, as there with sharded tensors; an orthogonal matrix of another kind
  in its place gains nothing (SmolLM2-135M, 9 heads: 2.56 nats per token without, 2.56 with a Hartley matrix, RTN).

Settings and placement are those of ruikangliu/Quantized-Reasoning-Models (scripts/quantization/quarot.sh,
methods/quarot_gptq/rotation_utils.py). A value bias is rotated with its weights, as there and unlike spcl/QuaRot, and
embeddings are not centred: a mean is nothing that an RMSNorm removes.

Departure: that code rotates o_proj by the whole H_heads kron H_head_dim but leaves the online half out of its vLLM
model unless tensors are sharded (methods/quarot_gptq, tp=1); here both are there.

Dimensions: V vocabulary, H hidden size, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from quant.calibration.streaming import BlockMethod
from quant.decoder import DOWN, GATE, INPUT_SITES, KEY, NORMS, OUTPUT, QUERY, UP, VALUE, DecoderShape
from quant.grids.scheme import Scheme
from quant.methods.gptq import gptq_blocks
from quant.methods.options import PUBLISHED_GPTQ, QuaRotOptions, RTNOptions
from quant.methods.rtn import rtn_blocks
from quant.student.sites import (
    INPUT_QUANTIZER,
    KV_QUANTIZER,
    KV_SITE,
    Clip,
    InputQuantizer,
    KVQuantizer,
)
from quant.transforms.hadamard import hadamard_factors, hadamard_matrix, is_known_order
from quant.transforms.kronecker import KroneckerTransform, WeightBasis
from quant.transforms.rewrite import Rewrite

ROWS_AT_A_TIME = 2**12
"""Of the embeddings: their float64 copy is bounded."""


def quarot_blocks(options: QuaRotOptions) -> BlockMethod:
    """GPTQ or RTN on the rotated model."""

    def rewrite(shape: DecoderShape, scheme: Scheme) -> Rewrite:
        return Rotation(shape, scheme, options)

    weights = rtn_blocks(RTNOptions()) if options.weights == "rtn" else gptq_blocks(options.gptq or PUBLISHED_GPTQ)
    return BlockMethod(weights.quantize, rewrite=rewrite, needs_calibration=weights.needs_calibration)


class Rotation:
    """The rotations of a model of one shape; ValueError where no Hadamard matrix of a size is known."""

    def __init__(self, shape: DecoderShape, scheme: Scheme, options: QuaRotOptions) -> None:
        hidden_size, head_DD = shape.hidden_size, hadamard_matrix(shape.head_dim)
        self._residual = KroneckerTransform(*hadamard_factors(hidden_size), random_signs(hidden_size, options.seed))
        value, key = KroneckerTransform(right_BB=head_DD), KroneckerTransform(right_BB=_exact(head_DD))
        mixes_heads = is_known_order(shape.num_heads)
        heads = KroneckerTransform(_exact(hadamard_matrix(shape.num_heads)) if mixes_heads else None)
        intermediate = KroneckerTransform(*map(_exact, hadamard_factors(shape.intermediate_size)))
        reader = WeightBasis((self._residual,))
        self._bases = {
            QUERY: reader,
            KEY: reader,
            VALUE: WeightBasis((self._residual,), value),
            OUTPUT: WeightBasis((value, heads), self._residual),
            UP: reader,
            GATE: reader,
            DOWN: WeightBasis((intermediate,), self._residual),
        }
        online = {OUTPUT: heads, DOWN: intermediate}
        self._site_tensors = _site_tensors(online, key, scheme, options)

    def block(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """See `quant.transforms.rewrite.Rewrite`: norms become ones, everything else the rotated tensors."""
        new = {name: tensor.double() for name, tensor in tensors.items()}
        for site, norm in NORMS.items():
            for linear in INPUT_SITES[site]:
                new[f"{linear}.weight"] = new[f"{linear}.weight"] * new[f"{norm}.weight"]
            new[f"{norm}.weight"] = torch.ones_like(new[f"{norm}.weight"])
        for linear, basis in self._bases.items():
            new[f"{linear}.weight"] = basis.weight(new[f"{linear}.weight"])
            if f"{linear}.bias" in new:
                new[f"{linear}.bias"] = basis.bias(new[f"{linear}.bias"])
        rewritten = {name: new[name].to(tensor.dtype).contiguous() for name, tensor in tensors.items()}
        return rewritten, dict(self._site_tensors)

    def embedding(self, embedding_VH: Tensor) -> Tensor:
        return torch.cat([self._residual(part.double()).to(part.dtype) for part in embedding_VH.split(ROWS_AT_A_TIME)])

    def head(self, head_VH: Tensor, norm_H: Tensor) -> tuple[Tensor, Tensor]:
        parts = (
            self._residual.inverse_transposed(part.double() * norm_H.double()).to(part.dtype)
            for part in head_VH.split(ROWS_AT_A_TIME)
        )
        return torch.cat(list(parts)), torch.ones_like(norm_H)


def random_signs(size: int, seed: int) -> Tensor:
    """[size] of -1 and 1, float64, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1


def _exact(hadamard_AA: Tensor) -> Tensor:
    """The matrix times a constant near one such that its entries are powers of two.

    An online transform is then the same in every dtype, bf16 too; orthonormal entries would be rounded, all in the same
    direction. The weights behind it take the exact inverse, and grids do not mind the constant.
    """
    exponent = round(math.log2(hadamard_AA.abs().max()))
    return (hadamard_AA.sign() * 2.0**exponent).float()


def _site_tensors(
    online: Mapping[str, KroneckerTransform], key: KroneckerTransform, scheme: Scheme, options: QuaRotOptions
) -> dict[str, Tensor]:
    """What a layer's sites hold: online transforms and, where something is quantized, clips."""
    activation_clip = None if scheme.activation_bits is None else _clip(options.activation_clip)
    quantizers: dict[str, InputQuantizer | KVQuantizer] = {
        f"{site}.{INPUT_QUANTIZER}": InputQuantizer(scheme.activation_bits, online.get(site), activation_clip)
        for site in INPUT_SITES
    }
    if scheme.kv_bits is not None:
        clip = _clip(options.kv_clip)
        quantizers[f"{KV_SITE}.{KV_QUANTIZER}"] = KVQuantizer(scheme.kv_bits, key, clip, clip)
    return {
        f"{name}.{leaf}": tensor for name, module in quantizers.items() for leaf, tensor in module.state_dict().items()
    }


def _clip(factor: float) -> Clip | None:
    return None if factor == 1 else Clip.constant(factor)
