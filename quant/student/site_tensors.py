"""Quantizers of a decoder layer <-> named tensors: what a checkpoint keeps of them.

Names are those of the modules' parameters (`model.layers.0.mlp.input_quantizer.transform.left`), so the tensors alone
say which transforms and clips there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from quant.decoder import INPUT_SITES, NORMS
from quant.grids.scheme import Scheme
from quant.student.linear import QuantLinear, quantized_linears
from quant.student.sites import (
    DOWN_SCALE,
    INPUT_QUANTIZER,
    KV_QUANTIZER,
    KV_SITE,
    VALUE_TRANSFORM,
    Clip,
    InputQuantizer,
    KVQuantizer,
    LayerSites,
    quantizers,
)
from quant.transforms.kronecker import KroneckerTransform

WEIGHT_CLIP = ".weight_clip"
"""The clip of a `QuantLinear`, which is part of the linear's state and of no site."""


def site_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All that training goes on from: transforms (with diagonals) and clips of every site, by full name."""
    owners = [(name, m) for name, m in model.named_modules() if isinstance(m, KroneckerTransform | Clip)]
    return {
        f"{name}.{leaf}": tensor.detach()
        for name, module in owners
        if not name.endswith(WEIGHT_CLIP)
        for leaf, tensor in module.state_dict().items()
    }


def online_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All that inference on the folded weights needs: without diagonals, and without what lies between two linears."""
    prefixes = tuple(f"{name}." for name, _ in quantizers(model))
    return {
        name: tensor
        for name, tensor in site_tensors(model).items()
        if name.startswith(prefixes) and not name.endswith(".diagonal")
    }


def is_site_tensor(name: str) -> bool:
    """Whether a tensor of that name belongs to a site rather than to a linear or norm."""
    parents = {f".{INPUT_QUANTIZER}.", f".{KV_QUANTIZER}.", f"{VALUE_TRANSFORM}.", f"{DOWN_SCALE}."}
    return any(parent in name for parent in parents)


def build_sites(
    tensors: Mapping[str, Tensor], scheme: Scheme, layers: Iterable[str], *, learned: bool
) -> dict[str, LayerSites]:
    """The quantizers of each layer (its full name) as `scheme` and the tensors' names say; none for a weight-only one.

    `learned` makes transforms and clips parameters.
    """
    if scheme.weight_only and not tensors:
        return {}
    return {layer: _layer_sites(_below(tensors, layer), scheme, learned) for layer in layers}


def folded_tensors(model: nn.Module) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """(name, how to make it) of each tensor of the plain model that computes, behind online quantizers, as `model`.

    Quantized weights are dequantized in their basis, norms take the diagonal of the transform behind them; a tied head
    appears once.
    """
    linears = dict(quantized_linears(model))
    diagonals = dict(_norm_diagonals(model))
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if is_site_tensor(name) or owner.endswith(WEIGHT_CLIP):
            continue
        if owner in diagonals:
            yield name, partial(_scaled, parameter, diagonals[owner])
        elif owner not in linears:
            yield name, parameter.detach
        elif leaf == "weight":
            yield name, partial(_rounded, linears[owner])
        elif leaf == "bias":
            yield name, linears[owner].bias_in_basis


@torch.no_grad()
def _rounded(linear: QuantLinear) -> Tensor:
    return linear.rounded_weight(linear.plain_dtype)


@torch.no_grad()
def _scaled(weight: Tensor, diagonal_I: Tensor) -> Tensor:
    return (weight.float() * diagonal_I.float()).to(weight.dtype)


def _norm_diagonals(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, quantizer in quantizers(model):
        site = name.removesuffix(f".{INPUT_QUANTIZER}")
        layer, _, leaf = site.rpartition(".")
        transform = quantizer.transform if isinstance(quantizer, InputQuantizer) else None
        if leaf in NORMS and transform is not None and transform.diagonal is not None:
            yield f"{layer}.{NORMS[leaf]}".lstrip("."), transform.diagonal


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) + 1 :]: tensor for name, tensor in tensors.items() if name.startswith(f"{prefix}.")}


def _layer_sites(tensors: Mapping[str, Tensor], scheme: Scheme, learned: bool) -> LayerSites:
    inputs = {}
    for site in INPUT_SITES:
        own = _below(tensors, f"{site}.{INPUT_QUANTIZER}")
        transform, clip = _transform(own, "transform", learned), _clip(own, "clip", learned)
        if scheme.activation_bits is not None or transform is not None:
            inputs[site] = InputQuantizer(scheme.activation_bits, transform, clip)
    own = _below(tensors, f"{KV_SITE}.{KV_QUANTIZER}")
    kv = None
    if scheme.kv_bits is not None:
        clips = (_clip(own, name, learned) for name in ("key_clip", "value_clip"))
        kv = KVQuantizer(scheme.kv_bits, _transform(own, "key_transform", learned), *clips)
    between = {name: _transform(tensors, name, learned) for name in (VALUE_TRANSFORM, DOWN_SCALE)}
    return LayerSites(inputs, kv, {name: transform for name, transform in between.items() if transform is not None})


def _transform(tensors: Mapping[str, Tensor], name: str, learned: bool) -> KroneckerTransform | None:
    parts = _below(tensors, name)
    if not parts:
        return None
    return KroneckerTransform(parts.get("left"), parts.get("right"), parts.get("diagonal"), learned=learned)


def _clip(tensors: Mapping[str, Tensor], name: str, learned: bool) -> Clip | None:
    logits = _below(tensors, name).get("logits")
    return None if logits is None else Clip(logits, learned=learned)
