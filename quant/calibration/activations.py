"""Where calibration activations wait between two blocks: in host memory, or in files mapped into it."""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

Keep = Callable[[Tensor], Tensor]
"""Gives back the tensor, detached, where it is to wait."""


def in_memory(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu()


def on_disk(folder: Path) -> Keep:
    """Keep tensors in files under `folder`, which the kernel reads and writes as memory allows.

    A file has no name once it is mapped: its space is free when the tensor is, also after a kill.
    """
    folder.mkdir(parents=True, exist_ok=True)

    def keep(tensor: Tensor) -> Tensor:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            mapped = torch.from_file(file.name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
        return mapped.view(tensor.shape).copy_(tensor.detach())

    return keep


def release_free_memory() -> None:
    """Give freed memory back to the system where the C library can (glibc's malloc_trim), otherwise do nothing.

    Activations of all sizes come and go around those that are kept: the heap is full of holes after every forward pass.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
