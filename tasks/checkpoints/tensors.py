"""The tensors of checkpoints: read by name over all shards, and written; none that is not finite passes either way."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from quant.decoder import EMBEDDING, HEAD
from tasks.checkpoints.files import FETCH, refused, tensor_infos
from tasks.runtime.stage import StageError

_OS_ERROR = re.compile(r"os error (\d+)")


class CheckpointTensors:
    """The tensors of a checkpoint folder by name, over all its shards; read when asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._shard_of = {name: info.shard for name, info in tensor_infos(folder).items()}

    def names(self) -> list[str]:
        return sorted(self._shard_of)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return the tensors as stored; StageError names those that the checkpoint lacks, or that are not finite."""
        names = list(names)
        if missing := [name for name in names if name not in self._shard_of]:
            raise refused(self.folder, f"it lacks the weights {', '.join(missing[:3])}", "fetch the checkpoint anew")
        tensors = {}
        for shard in sorted({self._shard_of[name] for name in names}):
            with safe_open(self.folder / shard, framework="pt") as file:
                tensors.update({name: file.get_tensor(name) for name in names if self._shard_of[name] == shard})
        for name, tensor in tensors.items():
            check_finite(name, tensor, self.folder)
        return tensors

    def are_tied(self) -> bool:
        """Whether the output embeddings are the input embeddings, stored once or twice."""
        if HEAD not in self._shard_of:
            return True
        return torch.equal(*self.read([EMBEDDING, HEAD]).values())

    def check(self) -> None:
        """Read every tensor once; StageError names one that is not finite."""
        for name in self.names():
            self.read([name])


def check_finite(name: str, tensor: Tensor, folder: Path) -> None:
    """Raise StageError if a tensor that was read from `folder` holds NaN or infinities."""
    if not is_finite(tensor):
        raise refused(folder, f"{name} holds NaN or infinities", f"{FETCH}, or take another release of the model")


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    # NaN and infinities stay in a sum, which takes a fiftieth of the time of isfinite (15 GB/s on one core, measured);
    # only a sum that overflowed has to be looked at again.
    return bool(tensor.sum(dtype=torch.float32).isfinite()) or bool(tensor.isfinite().all())


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file; StageError for a tensor that is not finite, OSError where the file system refuses."""
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise StageError(
                f"{name} is NaN or too large for {str(tensor.dtype).removeprefix('torch.')}, so nothing was saved: the "
                "computation diverged. Lower the learning rate, or start from another method or checkpoint"
            )
    try:
        save_file(dict(tensors), path, metadata={"format": "pt"})
    except SafetensorError as error:
        number = _OS_ERROR.search(str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), str(error), str(path)) from error
