"""Model folders <-> models: loading, and the writing of checkpoints.

A checkpoint is a Hugging Face folder whose weights are the dequantized bfloat16 weights, so any tool loads it.  A QAT
checkpoint also has `qat/`: `scheme.json`, and in safetensors, per quantized linear `<name>`, the fp32 latent
`<name>.weight` [O, I], `<name>.scale` and `<name>.zero` [O, G], and `<name>.clip` [O, G, 2] where clipping is learned;
and the transforms and clips of the decoder layers' sites (student/site_tensors.py).  Parameters outside the quantized
linears that bfloat16 cannot hold exactly (trained norms, say) are kept there in fp32 too, under their own names.

Where activations or caches are quantized or transformed, the weights alone are not the model.  Then config.json names
our quantization method, which other tools refuse, and `qat/online.safetensors` holds what works online.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from quant.grids.affine import CHECKPOINT_DTYPE, LinearState
from quant.grids.scheme import ScaleMode, Scheme
from quant.student.linear import QuantLinear, prepare, quantized_linears
from quant.student.site_tensors import build_sites, folded_tensors, is_site_tensor, online_tensors, site_tensors
from quant.student.sites import attach, decoder_layers
from tasks.checkpoints.files import INDEX, read_header, read_json, refused, write_json
from tasks.checkpoints.folders import (
    CONFIG,
    GENERATION_CONFIG,
    ONLINE_FILE,
    QAT_FOLDER,
    QUANT_METHOD,
    SCHEME_FILE,
    check_model_folder,
    copy_tokenizer,
    read_model_folder,
    read_scheme,
)
from tasks.checkpoints.skeleton import load_config, skeleton
from tasks.checkpoints.tensors import CheckpointTensors, check_finite, is_finite, save_tensors
from tasks.checkpoints.tokenizer import load_tokenizer
from tasks.data.wording import listed
from tasks.runtime.stage import StageError

__all__ = [
    "check_model_folder",
    "copy_tokenizer",
    "load_model",
    "load_student",
    "load_tokenizer",
    "read_scheme",
    "save_student",
]

# The shard size that Hugging Face's own writers used for years; tools and file systems are at ease with it.
MAX_SHARD_BYTES = 5 * 10**9


def load_model(
    path: Path, dtype: torch.dtype, device: str = "cpu", attn_implementation: str = "sdpa"
) -> PreTrainedModel:
    """The folder's model in evaluation mode, all weights in `dtype`, behind its quantizers of activations and caches.

    Raises StageError if a weight is missing or left over.
    """
    model = _load_plain(path, dtype, attn_implementation)
    if (path / QAT_FOLDER / ONLINE_FILE).is_file():
        tensors = load_file(path / QAT_FOLDER / ONLINE_FILE)
        scheme, _ = read_scheme(path)
        for layer, sites in build_sites(tensors, scheme, decoder_layers(model), learned=False).items():
            attach(model.get_submodule(layer), sites)
    return _on(model, device).eval()


def load_student(
    path: Path, scale_mode: ScaleMode, device: str = "cpu", attn_implementation: str = "sdpa"
) -> PreTrainedModel:
    """The student of a QAT checkpoint: fp32 latents with fake-quantized linears on their stored grids.

    Raises StageError for a folder without `qat/`, and for a scale_mode that does not go with it.
    """
    scheme, learned = read_scheme(path)
    if learned and scale_mode != "recomputed":
        raise StageError(f"{path} has learned transforms, from which its grids follow: set scale_mode='recomputed'")
    model = _load_plain(path, torch.float32, attn_implementation)
    latents = _Latents(path / QAT_FOLDER)
    prepare(
        model, scheme, latents, scale_mode, build_sites(latents.sites(), scheme, decoder_layers(model), learned=learned)
    )
    with torch.no_grad():
        for name in latents.others:
            model.get_parameter(name).copy_(latents.tensor(name))
    return _on(model, device)


def write_scheme(
    folder: Path, scheme: Scheme, learned_transforms: bool, online: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Write what says how a checkpoint is quantized into its `qat/`; returns what its config.json has to add."""
    (folder / QAT_FOLDER).mkdir(exist_ok=True)
    content = {"scheme": scheme.to_dict(), "learned_transforms": learned_transforms}
    write_json(folder / QAT_FOLDER / SCHEME_FILE, content)
    if scheme.weight_only and not online:
        return {}
    tensors = {name: tensor.to("cpu", torch.float32).contiguous() for name, tensor in online.items()}
    save_tensors(tensors, folder / QAT_FOLDER / ONLINE_FILE)
    return {"quantization_config": {"quant_method": QUANT_METHOD, **content}}


def _load_plain(path: Path, dtype: torch.dtype, attn_implementation: str) -> PreTrainedModel:
    folder = read_model_folder(path)
    config = load_config(folder)
    skeleton(folder, config)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        path,
        config=config,
        dtype=dtype,
        attn_implementation=attn_implementation,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        output_loading_info=True,
    )
    model, report = loaded
    # transformers fills missing weights with random numbers and only warns.
    if left := [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]:
        raise refused(path, f"transformers did not load {listed(map(str, left))}", "fetch the checkpoint anew")
    for name, parameter in model.named_parameters():
        _check_loaded(name, parameter.detach(), path, dtype)
    return model


def _check_loaded(name: str, tensor: Tensor, path: Path, dtype: torch.dtype) -> None:
    if is_finite(tensor):
        return
    check_finite(name, CheckpointTensors(path).read([name])[name], path)
    raise refused(path, f"{name} overflows in {str(dtype).removeprefix('torch.')}", "use bfloat16")


@torch.no_grad()
def save_student(model: PreTrainedModel, source: Path, folder: Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write `model` as a checkpoint into `folder`; configuration and tokenizer are those of the checkpoint `source`.

    A model without quantized linears gives a plain checkpoint, without `qat/`.  Tensors are made and written one shard
    at a time (at most `max_shard_bytes`, or one tensor), and the bytes depend on the weights only.
    """
    folder.mkdir(parents=True, exist_ok=True)
    linears = dict(quantized_linears(model))
    plain, latents = _plain_tensors(model), _latent_tensors(model, linears)
    shards = _write_shards(plain, folder, "model", max_shard_bytes)
    if len(shards) > 1:
        write_json(folder / INDEX, _index(plain, shards))
    config = read_json(source / CONFIG)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    if bool(config.get("tie_word_embeddings")) != tied:
        config["tie_word_embeddings"] = tied
    if linears:
        (folder / QAT_FOLDER).mkdir(exist_ok=True)
        _write_shards(latents, folder / QAT_FOLDER, "latent", max_shard_bytes)
        learned = any(linear.basis is not None for linear in linears.values())
        config |= write_scheme(folder, _common_scheme(linears), learned, online_tensors(model))
    config.pop("torch_dtype", None)  # the older name of the same field
    write_json(folder / CONFIG, config | {"dtype": str(CHECKPOINT_DTYPE).removeprefix("torch.")})
    if (source / GENERATION_CONFIG).is_file():
        shutil.copyfile(source / GENERATION_CONFIG, folder / GENERATION_CONFIG)
    copy_tokenizer(source, folder)


def _on(model: PreTrainedModel, device: str) -> PreTrainedModel:
    nn.Module.to(model, device)
    return model


@dataclass(frozen=True)
class _Lazy:
    """A tensor that is made when its shard is written."""

    make: Callable[[], Tensor]
    num_values: int
    num_bytes: int


def _lazy(tensor: Tensor, dtype: torch.dtype, make: Callable[[], Tensor] | None = None) -> _Lazy:
    """`tensor` in another dtype, or what `make` gives, which has its shape."""
    make = make or (lambda: tensor)
    return _Lazy(lambda: make().to("cpu", dtype).contiguous(), tensor.numel(), tensor.numel() * dtype.itemsize)


def _plain_tensors(model: nn.Module) -> dict[str, _Lazy]:
    """What a checkpoint's weights are: every parameter in bf16, quantized weights dequantized."""
    return {name: _lazy(model.get_parameter(name), CHECKPOINT_DTYPE, make) for name, make in folded_tensors(model)}


def _latent_tensors(model: nn.Module, linears: Mapping[str, QuantLinear]) -> dict[str, _Lazy]:
    """What training goes on from: latents, grids, sites, and the other parameters that the bf16 weights do not hold."""
    tensors = {}
    for name, module in linears.items():
        scale_OG, zero_OG = module.grid()
        tensors[f"{name}.weight"] = _lazy(module.weight, torch.float32)
        tensors[f"{name}.scale"] = _lazy(scale_OG, module.scheme.torch_scale_dtype)
        tensors[f"{name}.zero"] = _lazy(zero_OG, torch.float32)
        if module.weight_clip is not None:
            tensors[f"{name}.clip"] = _lazy(module.weight_clip.logits, torch.float32)
    tensors |= {name: _lazy(tensor, torch.float32) for name, tensor in site_tensors(model).items()}
    latent_weights = {f"{name}.weight" for name in linears}
    for name, make in folded_tensors(model):
        parameter = model.get_parameter(name)
        if name not in latent_weights and not torch.equal(make().to(CHECKPOINT_DTYPE).to(parameter.dtype), parameter):
            tensors[name] = _lazy(parameter, torch.float32)
    return tensors


def _write_shards(tensors: Mapping[str, _Lazy], folder: Path, stem: str, max_shard_bytes: int) -> dict[str, list[str]]:
    """Write tensors in order, shard by shard, named as Hugging Face names them; returns the names in each file."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.num_bytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += tensor.num_bytes
    suffixes = [f"-{i:05d}-of-{len(shards):05d}" for i in range(1, len(shards) + 1)] if len(shards) > 1 else [""]
    files = {f"{stem}{suffix}.safetensors": names for suffix, names in zip(suffixes, shards, strict=True)}
    for file, names in files.items():
        save_tensors({name: tensors[name].make() for name in names}, folder / file)
    return files


def _index(tensors: Mapping[str, _Lazy], shards: Mapping[str, list[str]]) -> dict[str, Any]:
    totals = {
        "total_parameters": sum(tensor.num_values for tensor in tensors.values()),
        "total_size": sum(tensor.num_bytes for tensor in tensors.values()),
    }
    return {"metadata": totals, "weight_map": {name: file for file, names in shards.items() for name in names}}


def _common_scheme(linears: Mapping[str, QuantLinear]) -> Scheme:
    schemes = {module.scheme for module in linears.values()}
    if len(schemes) > 1:
        raise ValueError(f"a checkpoint holds one scheme, the model has {len(schemes)}: prepare it with one scheme")
    return schemes.pop()


class _Latents(Mapping[str, LinearState]):
    """The states under `qat/`, each read when it is asked for; `others` are parameters that are no linear's."""

    def __init__(self, folder: Path) -> None:
        self._file_of: dict[str, Path] = {}
        for file in sorted(folder.glob("*.safetensors")):
            if file.name == ONLINE_FILE:
                continue
            self._file_of.update(dict.fromkeys(read_header(file), file))
        self._names = [name.removesuffix(".scale") for name in self._file_of if name.endswith(".scale")]
        own = {f"{name}.{part}" for name in self._names for part in ("weight", "scale", "zero", "clip")}
        self.others = [name for name in self._file_of if name not in own and not is_site_tensor(name)]

    def sites(self) -> dict[str, Tensor]:
        """The tensors of the decoder layers' sites."""
        return {name: self.tensor(name) for name in self._file_of if is_site_tensor(name)}

    def tensor(self, name: str) -> Tensor:
        if name not in self._file_of:
            raise StageError(f"the QAT checkpoint lacks {name}: run the stage that made it again, or fetch it anew")
        with safe_open(self._file_of[name], framework="pt") as shard:
            tensor = shard.get_tensor(name)
        check_finite(name, tensor, self._file_of[name])
        return tensor

    def __getitem__(self, name: str) -> LinearState:
        if name not in self._names:
            raise KeyError(name)
        weight, scale, zero = (self.tensor(f"{name}.{part}") for part in ("weight", "scale", "zero"))
        clip = self.tensor(f"{name}.clip") if f"{name}.clip" in self._file_of else None
        return LinearState(weight, scale.float(), zero, clip)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
