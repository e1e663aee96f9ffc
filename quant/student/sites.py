"""Where a decoder layer quantizes what flows through it: the inputs of its linears, and its keys and values.

A layer has four input sites (`decoder.INPUT_SITES`), each shared by the linears that read it (as in QRM, one activation
quantizer per group): self_attn (q, k, v), o_proj, mlp (up, gate) and down_proj. An `InputQuantizer` becomes the
submodule `input_quantizer` of the module at the site and works in a forward pre-hook, so no model class is copied and
parameter names stay those of Hugging Face. A `KVQuantizer` becomes `kv_quantizer` of self_attn: it stands between RoPE
and the key/value cache, by handing the attention a cache that quantizes what it is given before the real cache, if
there is one, stores it. So training, prefill and decoding see the same keys and values.

Dimensions: B sequences, H key/value heads, T tokens, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from quant.decoder import ATTENTION, DOWN, INPUT_SITES, MLP, OUTPUT, UP, VALUE
from quant.grids.dynamic import DynamicGrid, dynamic_fake_quantize
from quant.transforms.kronecker import KroneckerTransform, WeightBasis

KV_SITE = ATTENTION
INPUT_QUANTIZER, KV_QUANTIZER = "input_quantizer", "kv_quantizer"
VALUE_TRANSFORM, DOWN_SCALE = f"{ATTENTION}.value_transform", f"{MLP}.down_scale"
"""Transforms between two linears, which live in the weights of both alone: v_proj to o_proj, up_proj to down_proj."""


class Clip(nn.Module):
    """Learned factors of a range, sigmoid(logits) in (0, 1), the last dimension being (low, high)."""

    def __init__(self, logits: Tensor, *, learned: bool) -> None:
        super().__init__()
        self.logits: Tensor
        if learned:
            self.register_parameter("logits", nn.Parameter(logits.detach().clone()))
        else:
            self.register_buffer("logits", logits.detach().clone())

    @classmethod
    def constant(cls, factor: float) -> Clip:
        """The same, fixed factor for low and high; ValueError unless it lies strictly between 0 and 1."""
        if not 0 < factor < 1:
            raise ValueError(f"a clip factor must lie strictly between 0 and 1, not {factor}; leave clipping out for 1")
        return cls(torch.logit(torch.full((2,), factor, dtype=torch.float64)).float(), learned=False)

    def forward(self) -> Tensor:
        return self.logits.sigmoid()


class InputQuantizer(nn.Module):
    """x -> fake quantization of x P, per token; either part may be absent.

    `enabled` switches the quantization (not the transform) off: a model whose transforms are right then equals the
    original one.
    """

    def __init__(self, bits: int | None, transform: KroneckerTransform | None = None, clip: Clip | None = None) -> None:
        super().__init__()
        self.grid = None if bits is None else DynamicGrid(bits)
        self.transform, self.clip = transform, clip
        self.enabled = True

    def forward(self, x: Tensor) -> Tensor:
        if self.transform is not None:
            x = self.transform(x)
        if self.grid is None or not self.enabled:
            return x
        return dynamic_fake_quantize(x, self.grid, None if self.clip is None else self.clip())


class KVQuantizer(nn.Module):
    """Keys (after RoPE) and values -> their fake quantization, per token and head.

    Keys are quantized in the basis of `key_transform` P and then brought back: q (fq(k P) P^-1)^T is
    (q P^-T) fq(k P)^T, so the queries, of which there are more, need no transform. A transform of the values is part of
    v_proj and o_proj.
    """

    def __init__(
        self,
        bits: int | None,
        key_transform: KroneckerTransform | None = None,
        key_clip: Clip | None = None,
        value_clip: Clip | None = None,
    ) -> None:
        super().__init__()
        self.grid = None if bits is None else DynamicGrid(bits)
        self.key_transform, self.key_clip, self.value_clip = key_transform, key_clip, value_clip
        self.enabled = True

    def forward(self, key_BHTD: Tensor, value_BHTD: Tensor) -> tuple[Tensor, Tensor]:
        if self.grid is None or not self.enabled:
            return key_BHTD, value_BHTD
        if self.key_transform is not None:
            key_BHTD = self.key_transform(key_BHTD)
        key_BHTD = dynamic_fake_quantize(key_BHTD, self.grid, None if self.key_clip is None else self.key_clip())
        if self.key_transform is not None:
            key_BHTD = self.key_transform.inverse(key_BHTD)
        factors = None if self.value_clip is None else self.value_clip()
        return key_BHTD, dynamic_fake_quantize(value_BHTD, self.grid, factors)


@dataclass(frozen=True)
class LayerSites:
    """What is quantized in one decoder layer: input quantizers by site (`INPUT_SITES`), and the cache's."""

    inputs: dict[str, InputQuantizer]
    kv: KVQuantizer | None = None
    between: dict[str, KroneckerTransform] = field(default_factory=dict)
    """VALUE_TRANSFORM and DOWN_SCALE, where a method has them."""

    def weight_basis(self, linear: str) -> WeightBasis:
        """The basis of the linear of that name in the layer, where all transforms are in the weights' place."""
        site = next(site for site, linears in INPUT_SITES.items() if linear in linears)
        before = {OUTPUT: VALUE_TRANSFORM, DOWN: DOWN_SCALE}.get(linear)
        after = {VALUE: VALUE_TRANSFORM, UP: DOWN_SCALE}.get(linear)
        quantizer = self.inputs.get(site)
        inputs = (self.between.get(before or ""), None if quantizer is None else quantizer.transform)
        return WeightBasis(tuple(t for t in inputs if t is not None), self.between.get(after or ""))


def decoder_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The decoder layers of a Llama, Qwen2 or Qwen3 model by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(getattr(module, ATTENTION, None), nn.Module) and isinstance(getattr(module, MLP, None), nn.Module)
    }


def attach(layer: nn.Module, sites: LayerSites) -> None:
    """Make the quantizers submodules of `layer` at their sites, in the place of those that are there already.

    They are at work from its next forward pass on.
    """
    for site, quantizer in sites.inputs.items():
        attach_input(layer.get_submodule(site), quantizer)
    for name, transform in sites.between.items():
        parent, _, leaf = name.rpartition(".")
        layer.get_submodule(parent).add_module(leaf, transform)
    if sites.kv is not None:
        attention = layer.get_submodule(KV_SITE)
        if not hasattr(attention, KV_QUANTIZER):
            attention.register_forward_pre_hook(_quantize_cache, with_kwargs=True)
        attention.add_module(KV_QUANTIZER, sites.kv)


def attach_input(module: nn.Module, quantizer: InputQuantizer) -> None:
    """Put `quantizer` before `module`, whose first or `hidden_states` argument is its input."""
    if not hasattr(module, INPUT_QUANTIZER):
        module.register_forward_pre_hook(_quantize_input, with_kwargs=True)
    module.add_module(INPUT_QUANTIZER, quantizer)


def quantizers(model: nn.Module) -> Iterator[tuple[str, InputQuantizer | KVQuantizer]]:
    """(name, module) of every attached quantizer, in the model's order."""
    kinds = (InputQuantizer, KVQuantizer)
    return ((name, module) for name, module in model.named_modules() if isinstance(module, kinds))


def learned_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """What is learned beside weights: of transforms (with their scales), and of clips; empty where they are fixed."""
    transforms = [p for m in model.modules() if isinstance(m, KroneckerTransform) for p in m.parameters()]
    clips = [p for m in model.modules() if isinstance(m, Clip) for p in m.parameters()]
    return transforms, clips


@contextmanager
def quantizers_disabled(model: nn.Module) -> Iterator[None]:
    """Inside, activations and caches are not quantized; transforms stay in place."""
    modules = [module for _, module in quantizers(model)]
    before = [module.enabled for module in modules]
    for module in modules:
        module.enabled = False
    try:
        yield
    finally:
        for module, enabled in zip(modules, before, strict=True):
            module.enabled = enabled


def _quantize_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    quantizer = module.get_submodule(INPUT_QUANTIZER)
    if args:
        return (quantizer(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": quantizer(kwargs["hidden_states"])}


def _quantize_cache(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    quantizer = module.get_submodule(KV_QUANTIZER)
    assert isinstance(quantizer, KVQuantizer)
    return args, {**kwargs, "past_key_values": _QuantizingCache(quantizer, kwargs.get("past_key_values"))}


class _QuantizingCache:
    """Stands in for the cache of one attention call; all that attention does with a cache is `update`."""

    def __init__(self, quantizer: KVQuantizer, cache: Any) -> None:
        self._quantizer, self._cache = quantizer, cache

    def update(self, key_BHTD: Tensor, value_BHTD: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        key_BHTD, value_BHTD = self._quantizer(key_BHTD, value_BHTD)
        if self._cache is None:
            return key_BHTD, value_BHTD
        return self._cache.update(key_BHTD, value_BHTD, *args, **kwargs)
