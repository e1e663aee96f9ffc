"""Mid-stage checkpoints: trained parameters, optimizer moments, step and log, in safetensors and JSON.

A checkpoint is one folder that appears by a rename, so a kill at any moment leaves the previous one whole.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

PREFIX = "checkpoint-"
Row = dict[str, Any]


def latest(scratch: Path) -> Path | None:
    """The newest complete checkpoint folder in `scratch`."""
    return max(scratch.glob(f"{PREFIX}*"), default=None)


def trained_state(module: nn.Module) -> dict[str, Tensor]:
    """What training can change: parameters that require a gradient (tied ones once) and persistent buffers."""
    persistent = module.state_dict(keep_vars=True).keys()
    state = {name: p.data for name, p in module.named_parameters() if p.requires_grad}
    return state | {name: b for name, b in module.named_buffers() if name in persistent}


def save(scratch: Path, module: nn.Module, optimizers: Sequence[torch.optim.Optimizer], rows: list[Row]) -> None:
    """Write the state after `len(rows)` steps and remove older checkpoints."""
    scratch.mkdir(parents=True, exist_ok=True)
    folder = scratch / f"{PREFIX}{len(rows):08d}"
    temporary = scratch / f"tmp-{folder.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    _save_tensors(trained_state(module), temporary / "parameters.safetensors")
    for i, optimizer in enumerate(optimizers):
        _save_tensors(_moments(optimizer), temporary / f"optimizer-{i}.safetensors")
    (temporary / "log.json").write_text(json.dumps(rows))
    for path in [*temporary.iterdir(), temporary]:
        _fsync(path)
    if folder.exists():
        shutil.rmtree(folder)
    temporary.rename(folder)
    _fsync(scratch)
    for old in scratch.glob(f"{PREFIX}*"):
        if old != folder:
            shutil.rmtree(old)


def restore(scratch: Path, module: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> list[Row]:
    """Load the newest checkpoint into `module` and `optimizers`; returns its log rows, [] when there is none."""
    folder = latest(scratch)
    if folder is None:
        return []
    saved = load_file(folder / "parameters.safetensors")
    state = trained_state(module)
    if saved.keys() != state.keys():
        raise ValueError(f"{folder} does not belong to this model (names differ); remove it to start anew")
    for name, value in state.items():
        value.copy_(saved[name])
    for i, optimizer in enumerate(optimizers):
        _load_moments(optimizer, load_file(folder / f"optimizer-{i}.safetensors"))
    return json.loads((folder / "log.json").read_text())


def _moments(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Optimizer state as `<parameter number>.<name>`; only tensors, so an optimizer with other state is refused."""
    moments = {}
    for number, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            if not isinstance(value, Tensor):
                raise ValueError(f"optimizer state {name!r} is not a tensor: such an optimizer cannot be resumed")
            moments[f"{number}.{name}"] = value
    return moments


def _load_moments(optimizer: torch.optim.Optimizer, moments: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in moments.items():
        number, name = key.split(".", 1)
        state.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, path)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
