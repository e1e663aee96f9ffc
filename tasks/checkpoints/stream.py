"""Decoder blocks of a Hugging Face checkpoint, read and written one at a time (a `streaming.BlockStream`).

The model is built on the meta device; a block's weights are read from the checkpoint by name when its turn comes.  The
result has one shard per block, and under `qat/` one file of latent weights and grids per block.

Dimensions: N sequences, B sequences of a batch, T tokens, H hidden size.
"""

from __future__ import annotations

import copy
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from artifacts import scratch as midstage
from quant.calibration.activations import Keep, in_memory
from quant.calibration.streaming import Batch, LinearResult
from quant.decoder import EMBEDDING, FINAL_NORM, HEAD, DecoderShape, layer_name
from quant.grids.affine import CHECKPOINT_DTYPE
from quant.grids.scheme import Scheme
from quant.student.site_tensors import build_sites, is_site_tensor, online_tensors
from quant.student.sites import attach, quantizers
from quant.student.targets import check_group_size
from quant.transforms.rewrite import RewriteFactory
from tasks.checkpoints.files import INDEX, read_header, read_json, write_json
from tasks.checkpoints.folders import (
    CONFIG,
    GENERATION_CONFIG,
    ONLINE_FILE,
    QAT_FOLDER,
    copy_tokenizer,
    read_base_folder,
)
from tasks.checkpoints.models import write_scheme
from tasks.checkpoints.skeleton import load_config, skeleton
from tasks.checkpoints.tensors import CheckpointTensors, save_tensors

WEIGHTS_FILE, LATENTS_FILE, REPORT_FILE = "weights.safetensors", "latents.safetensors", "report.json"


class CheckpointStream:
    """Blocks from the checkpoint `base`; quantized ones go to `scratch`, a folder each, then to the output.

    With `rewrite` they and all around them are those of the rewritten model, each rewritten when it is read.
    """

    def __init__(
        self, base: Path, scratch: Path, scheme: Scheme, device: str, rewrite: RewriteFactory | None = None
    ) -> None:
        self.base, self.scratch, self.scheme, self.device = base, scratch, scheme, device
        folder = read_base_folder(base)
        self.tensors = CheckpointTensors(base)
        self.config = load_config(folder)
        self.dtype: torch.dtype = getattr(torch, folder.dtype)
        model = skeleton(folder, self.config)
        self.rewrite = None if rewrite is None else rewrite(DecoderShape.from_config(self.config.to_dict()), scheme)
        self.head = HEAD if folder.has_own_head else EMBEDDING
        check_group_size(model, scheme)
        self.inner = model.model.eval()
        self._blocks = list(self.inner.layers)
        self.num_blocks = len(self._blocks)

    def batches(self, input_ids_NT: Tensor, mask_NT: Tensor, batch_size: int, keep: Keep = in_memory) -> list[Batch]:
        """Embed the calibration sequences: what the model itself hands to its blocks, recorded without blocks.

        Every batch needs a token that counts; columns of padding at either end of a batch are left out.
        Hidden states wait where `keep` puts them, position embeddings and (of padded batches) attention masks in host
        memory.
        """
        inner = self.inner
        recorders = [_Recorder() for _ in range(self.num_blocks)]
        inner.layers, inner.norm = nn.ModuleList(recorders), nn.Identity()
        inner.rotary_emb = type(inner.rotary_emb)(config=self.config)
        embeddings = inner.get_input_embeddings()
        embeddings.weight = _frozen(self._embedding().to(self.dtype))
        batches = []
        for input_ids_BT, mask_BT in zip(input_ids_NT.split(batch_size), mask_NT.bool().split(batch_size), strict=True):
            used_T = mask_BT.any(0).nonzero()
            span = slice(int(used_T[0]), int(used_T[-1]) + 1)
            input_ids_BT, mask_BT = input_ids_BT[:, span], mask_BT[:, span]
            with torch.no_grad():
                inner(input_ids=input_ids_BT, attention_mask=mask_BT.long(), use_cache=False)
            inputs = [recorder.inputs for recorder in recorders]
            mask = None if bool(mask_BT.all()) else mask_BT
            batches.append(Batch(keep(recorders[0].hidden_BTH), mask, inputs, keep))
        embeddings.weight = _frozen(embeddings.weight.to("meta"))
        return batches

    def num_stored(self) -> int:
        return next((i for i in range(self.num_blocks) if not midstage.is_sound(self._folder(i))), self.num_blocks)

    def load(self, index: int) -> nn.Module:
        prefix = self._prefix(index)
        names = {f"{prefix}{name}": name for name in self._blocks[index].state_dict()}
        own = {names[name]: tensor for name, tensor in self.tensors.read(names).items()}
        if self.rewrite is None:
            return self._block(index, own, {})
        own, sites = self.rewrite.block(own)
        return self._block(index, own, {f"{prefix}{name}": tensor for name, tensor in sites.items()})

    def load_stored(self, index: int) -> nn.Module:
        prefix, tensors = self._prefix(index), load_file(self._folder(index) / WEIGHTS_FILE)
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        return self._block(index, own, load_file(self._folder(index) / ONLINE_FILE))

    def store(
        self, index: int, block: nn.Module, results: Mapping[str, LinearResult], further: Mapping[str, Tensor]
    ) -> None:
        """Tensors that the method left alone are written as the checkpoint holds them."""
        prefix, scheme = self._prefix(index), self.scheme
        own = {name: tensor for name, tensor in block.state_dict().items() if not is_site_tensor(name)}
        now = {f"{prefix}{name}": tensor.cpu() for name, tensor in own.items()}
        weights = self.tensors.read(now)
        weights.update({n: tensor for n, tensor in now.items() if not tensor.equal(weights[n].to(tensor.dtype))})
        latents = {f"{prefix}{name}": tensor.float().cpu() for name, tensor in further.items()}
        for name, result in results.items():
            state = result.state
            weights[f"{prefix}{name}.weight"] = now[f"{prefix}{name}.weight"].to(CHECKPOINT_DTYPE)
            latents[f"{prefix}{name}.weight"] = state.weight.float().cpu()
            latents[f"{prefix}{name}.scale"] = state.scale.to(scheme.torch_scale_dtype).cpu()
            latents[f"{prefix}{name}.zero"] = state.zero.float().cpu()
            if state.clip is not None:
                latents[f"{prefix}{name}.clip"] = state.clip.float().cpu()
        online = {f"{prefix}{name}": tensor.cpu() for name, tensor in online_tensors(block).items()}
        with midstage.writing(self._folder(index)) as folder:
            save_tensors(weights, folder / WEIGHTS_FILE)
            save_tensors(latents, folder / LATENTS_FILE)
            save_tensors(online, folder / ONLINE_FILE)
            write_json(folder / REPORT_FILE, {f"{prefix}{name}": result.report for name, result in results.items()})

    def report(self) -> dict[str, dict[str, float | int]]:
        """The figures of every linear by its full name, all blocks being stored."""
        report: dict[str, dict[str, float | int]] = {}
        for index in range(self.num_blocks):
            report.update(read_json(self._folder(index) / REPORT_FILE))
        return report

    def finish(self, output: Path, learned_transforms: bool) -> None:
        """Put the checkpoint together in `output`, all blocks being stored."""
        online: dict[str, Tensor] = {}
        for index in range(self.num_blocks):
            online |= load_file(self._folder(index) / ONLINE_FILE)
        more_config = write_scheme(output, self.scheme, learned_transforms, online)
        if self.rewrite is not None or (self.config.tie_word_embeddings and not self.tensors.are_tied()):
            more_config |= {"tie_word_embeddings": False}
        qat = output / QAT_FOLDER
        num_shards = self.num_blocks + 1
        shards = [f"model-{i:05d}-of-{num_shards:05d}.safetensors" for i in range(1, num_shards + 1)]
        of_blocks = tuple(self._prefix(index) for index in range(self.num_blocks))
        save_tensors(self._around_blocks(of_blocks), output / shards[0])
        for index, shard in enumerate(shards[1:]):
            _link(self._folder(index) / WEIGHTS_FILE, output / shard)
            _link(self._folder(index) / LATENTS_FILE, qat / f"block-{index:05d}.safetensors")
        write_json(output / INDEX, _index(output, shards))
        write_json(output / CONFIG, read_json(self.base / CONFIG) | more_config)
        if (self.base / GENERATION_CONFIG).is_file():
            shutil.copyfile(self.base / GENERATION_CONFIG, output / GENERATION_CONFIG)
        copy_tokenizer(self.base, output)

    def _embedding(self) -> Tensor:
        embedding_VH = self.tensors.read([EMBEDDING])[EMBEDDING]
        return embedding_VH if self.rewrite is None else self.rewrite.embedding(embedding_VH)

    def _around_blocks(self, of_blocks: tuple[str, ...]) -> dict[str, Tensor]:
        """The tensors of no block: embeddings, final norm, head."""
        tensors = self.tensors.read(name for name in self.tensors.names() if not name.startswith(of_blocks))
        if self.rewrite is not None:
            before = self.tensors.read([self.head, FINAL_NORM])
            tensors[HEAD], tensors[FINAL_NORM] = self.rewrite.head(before[self.head], before[FINAL_NORM])
            tensors[EMBEDDING] = self._embedding()
        return tensors

    def _block(self, index: int, tensors: Mapping[str, Tensor], online: Mapping[str, Tensor]) -> nn.Module:
        """The block with its sites at their places, switched off: PTQ looks at activations as they are."""
        block = copy.deepcopy(self._blocks[index])
        placed = {name: tensor.to(self.device, self.dtype) for name, tensor in tensors.items()}
        block.load_state_dict(placed, strict=True, assign=True)
        layer = self._prefix(index).removesuffix(".")
        for sites in build_sites(online, self.scheme, [layer], learned=False).values():
            attach(block, sites)
        for _, quantizer in quantizers(block):
            quantizer.to(self.device).enabled = False
        return block.requires_grad_(False).eval()

    def _folder(self, index: int) -> Path:
        return self.scratch / f"block-{index:05d}"

    @staticmethod
    def _prefix(index: int) -> str:
        return f"{layer_name(index)}."


class _Recorder(nn.Module):
    """Stands in for a block: keeps what it is given and passes the hidden states on."""

    def forward(self, hidden_states: Tensor, **inputs: Any) -> Tensor:
        self.hidden_BTH = hidden_states
        self.inputs = {name: value for name, value in inputs.items() if value is not None}
        return hidden_states


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _index(folder: Path, shards: list[str]) -> dict[str, Any]:
    infos = [info for shard in shards for info in read_header(folder / shard).items()]
    totals = {
        "total_parameters": sum(math.prod(info.shape) for _, info in infos),
        "total_size": sum(math.prod(info.shape) * info.value_bytes for _, info in infos),
    }
    return {"metadata": totals, "weight_map": dict(sorted((name, info.shard) for name, info in infos))}


def _link(source: Path, target: Path) -> None:
    """A hard link where the file system has them, so that large latents are not written twice; otherwise a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
