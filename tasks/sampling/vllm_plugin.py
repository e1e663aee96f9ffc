"""vLLM's side of a checkpoint that quantizes activations or caches: the quantization method "reasoning_qat".

vLLM calls `register` in each of its processes (entry point group `vllm.general_plugins`), and takes the method when a
checkpoint's config.json names it. No model class is copied: the linears of Llama, Qwen2 and Qwen3 ask the method how
to compute, and an attention layer gets a forward pre-hook, which sees keys after RoPE and before the cache. What they
do is quant/student/sites.py, the same code as behind transformers.

In vLLM q, k, v and gate, up are one linear each, so every linear is one input site.
Dimensions: N tokens of all sequences, H key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from quant.decoder import VLLM_ATTENTION, VLLM_SITES
from quant.grids.scheme import Scheme
from quant.student.site_tensors import build_sites
from quant.student.sites import InputQuantizer, KVQuantizer, LayerSites
from tasks.checkpoints.folders import ONLINE_FILE, QAT_FOLDER, QUANT_METHOD


def register() -> None:
    """Make the method known to vLLM; may be called again."""
    register_quantization_config(QUANT_METHOD)(ReasoningQATConfig)


class ReasoningQATConfig(QuantizationConfig):
    """The method as vLLM knows it, and the owner of all quantizers, so that new tensors reach them in one place.

    vLLM copies and pickles it before the model is built; quantizers are made when the layers ask for them.
    """

    def __init__(self, scheme: Scheme) -> None:
        super().__init__()
        self.scheme = scheme
        self.tensors: dict[str, Tensor] = {}
        self.sites: dict[str, LayerSites] = {}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ReasoningQATConfig:
        """From `quantization_config` of a config.json, as tasks/checkpoints/models.py writes it."""
        return cls(Scheme.from_dict(config["scheme"]))

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Read what works online. ValueError unless `model_name` is a local folder that has it."""
        file = Path(model_name) / QAT_FOLDER / ONLINE_FILE
        if not file.is_file():
            raise ValueError(
                f"{model_name} lacks {QAT_FOLDER}/{ONLINE_FILE}, without which its weights are not the model: "
                f"give a local folder that holds the whole checkpoint, {QAT_FOLDER}/ included"
            )
        self.tensors = load_file(file)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Compute with other transforms and clips from now on. ValueError unless names and shapes are the same."""
        shapes, known = ({name: t.shape for name, t in each.items()} for each in (tensors, self.tensors))
        if differing := sorted(name for name in shapes | known if shapes.get(name) != known.get(name)):
            raise ValueError(
                f"{len(differing)} transforms or clips are not those of the opened checkpoint (first: {differing[0]}): "
                "open a new engine on a checkpoint of this model"
            )
        self.tensors = {name: t.detach().to(self.tensors[name].device, torch.float32) for name, t in tensors.items()}
        self._build(self.sites)

    def enable(self, enabled: bool) -> None:
        """Switch the quantization of activations and caches on or off; transforms stay (quant/student/sites.py)."""
        for sites in self.sites.values():
            quantizers: list[InputQuantizer | KVQuantizer] = [*sites.inputs.values()]
            quantizers += [] if sites.kv is None else [sites.kv]
            for quantizer in quantizers:
                quantizer.enabled = enabled

    def get_quant_method(self, layer: nn.Module, prefix: str) -> UnquantizedLinearMethod | None:
        """The method of a decoder layer's linear; embeddings and head compute as ever, attention gets its hook."""
        if not isinstance(layer, LinearBase | Attention):
            return None
        decoder_layer, place = _split(prefix)
        if decoder_layer not in self.sites:
            _check_engine(get_current_vllm_config())
            device = torch.get_default_device()  # where vLLM puts the weights that the layer is about to create
            self.tensors = {name: tensor.to(device) for name, tensor in self.tensors.items()}
            self._build([decoder_layer])
        if isinstance(layer, LinearBase):
            return InputQuantizedLinearMethod(self, decoder_layer, VLLM_SITES[place])
        # vLLM asks for an attention layer's method several times.
        if not any(isinstance(hook, KVHook) for hook in layer._forward_pre_hooks.values()):
            layer.register_forward_pre_hook(KVHook(self, decoder_layer))
        return None

    def _build(self, layers: Iterable[str]) -> None:
        self.sites |= build_sites(self.tensors, self.scheme, list(layers), learned=False)

    def get_name(self) -> Any:  # vLLM types it as one of its own names
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0  # plain torch: any GPU that vLLM runs on

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []


class InputQuantizedLinearMethod(UnquantizedLinearMethod):
    """A linear with plain weights that computes on the quantized inputs of its site."""

    def __init__(self, config: ReasoningQATConfig, decoder_layer: str, site: str) -> None:
        super().__init__()
        self.config, self.decoder_layer, self.site = config, decoder_layer, site

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        quantizer: InputQuantizer | None = self.config.sites[self.decoder_layer].inputs.get(self.site)
        return super().apply(layer, x if quantizer is None else quantizer(x), bias)


class KVHook:
    """Forward pre-hook of an attention layer: quantizes its keys [N, H*D], already rotated, and values."""

    def __init__(self, config: ReasoningQATConfig, decoder_layer: str) -> None:
        self.config, self.decoder_layer = config, decoder_layer

    def __call__(self, attention: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        quantizer: KVQuantizer | None = self.config.sites[self.decoder_layer].kv
        if quantizer is None:
            return args
        query, key, value, *others = args
        key_NHD, value_NHD = (x.unflatten(-1, (-1, attention.head_size)) for x in (key, value))
        key_NHD, value_NHD = quantizer(key_NHD, value_NHD)
        return query, key_NHD.flatten(-2), value_NHD.flatten(-2), *others


def load_online(worker: Any, tensors: Mapping[str, Tensor]) -> None:
    """For `LLM.collective_rpc`: `ReasoningQATConfig.load` in a worker."""
    _config(worker).load(tensors)


def enable_quantizers(worker: Any, enabled: bool) -> None:
    """For `LLM.collective_rpc`: `ReasoningQATConfig.enable` in a worker."""
    _config(worker).enable(enabled)


def _config(worker: Any) -> ReasoningQATConfig:
    """The method that vLLM made; the cast names its class, which nothing else does, so that keys know its code."""
    return cast(ReasoningQATConfig, worker.vllm_config.quant_config)


def _check_engine(config: VllmConfig) -> None:
    if config.parallel_config.tensor_parallel_size > 1:
        raise ValueError(
            f"{QUANT_METHOD} checkpoints run with tensor_parallel_size=1 only: the inputs of o_proj and down_proj, "
            "split over ranks, would be transformed and scaled in parts"
        )
    if not config.model_config.enforce_eager:
        raise ValueError(f"{QUANT_METHOD} checkpoints run uncompiled: open vLLM with enforce_eager=True")


def _split(prefix: str) -> tuple[str, str]:
    """("model.layers.0", "mlp.down_proj"); ValueError for a module that Llama, Qwen2 and Qwen3 do not have."""
    parts = prefix.split(".")
    decoder_layer, place = ".".join(parts[:-2]), ".".join(parts[-2:])
    if place not in (*VLLM_SITES, VLLM_ATTENTION):
        raise ValueError(
            f"{QUANT_METHOD} does not know {prefix}: Llama, Qwen2 and Qwen3 run in vLLM's own implementation "
            "(model_impl='vllm'); others run in the transformers engine"
        )
    return decoder_layer, place
