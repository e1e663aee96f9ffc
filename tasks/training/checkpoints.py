"""Mid-stage checkpoints: trained parameters, optimizer moments, step and log, in safetensors and JSON.

A checkpoint is one folder that appears by a rename, so a kill at any moment leaves the one before it whole.  The last
two are kept, for the case that one turns out damaged: 24 bytes a trained parameter with Adam in fp32.  The older one is
removed before the next is written, so there are never more than two.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from artifacts import scratch as midstage

PREFIX = "checkpoint-"
PARAMETERS, LOG = "parameters.safetensors", "log.json"
Row = dict[str, Any]


def trained_state(module: nn.Module) -> dict[str, Tensor]:
    """What training can change: parameters that require a gradient (tied ones once) and persistent buffers."""
    persistent = module.state_dict(keep_vars=True).keys()
    state = {name: p.data for name, p in module.named_parameters() if p.requires_grad}
    return state | {name: b for name, b in module.named_buffers() if name in persistent}


def num_steps(rows: Sequence[Row]) -> int:
    """How many steps a log covers; its first row may be the start's, step 0."""
    return int(rows[-1]["step"]) if rows else 0


def save(scratch: Path, module: nn.Module, optimizers: Sequence[torch.optim.Optimizer], rows: list[Row]) -> None:
    """Write the state after the steps of `rows`, beside the newest checkpoint before it."""
    for old in sorted(scratch.glob(f"{PREFIX}*"))[:-1]:
        midstage.remove(old)
    with midstage.writing(scratch / f"{PREFIX}{num_steps(rows):08d}") as folder:
        save_parameters(module, folder / PARAMETERS)
        for i, optimizer in enumerate(optimizers):
            _save_tensors(_moments(optimizer), folder / _optimizer_file(i))
        (folder / LOG).write_text(json.dumps(rows))


def save_parameters(module: nn.Module, path: Path) -> None:
    """Write what training can change."""
    _save_tensors(trained_state(module), path)


def load_parameters(path: Path, module: nn.Module) -> None:
    """Copy what `save_parameters` wrote into `module`, one tensor at a time."""
    with safe_open(path, framework="pt") as file:
        for name, value in trained_state(module).items():
            value.copy_(file.get_tensor(name))


def logs(scratch: Path) -> Iterator[list[Row]]:
    """The log rows of each checkpoint, oldest first; a damaged one is passed over."""
    for folder in sorted(scratch.glob(f"{PREFIX}*")):
        with contextlib.suppress(OSError, ValueError):
            yield json.loads((folder / LOG).read_text())


def restore(
    scratch: Path,
    module: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    can_continue: Callable[[list[Row]], bool] = lambda rows: True,
) -> list[Row]:
    """Load the newest sound checkpoint into `module` and `optimizers`; returns its log rows, [] when there is none.

    Checkpoints that are damaged, are not of this module, or whose rows cannot be continued, are set aside; nothing of
    them is loaded.
    """
    for folder in sorted(scratch.glob(f"{PREFIX}*"), reverse=True):
        if not midstage.is_sound(folder):
            continue
        try:
            return _load(folder, module, optimizers, can_continue)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            midstage.set_aside(folder, f"not of this run: {error}")
    return []


def _load(
    folder: Path,
    module: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    can_continue: Callable[[list[Row]], bool],
) -> list[Row]:
    rows: list[Row] = json.loads((folder / LOG).read_text())
    if folder.name != f"{PREFIX}{num_steps(rows):08d}":
        raise ValueError(f"its log has {num_steps(rows)} steps")
    if not can_continue(rows):
        raise ValueError("the best state before it is gone")
    saved, present = load_file(folder / PARAMETERS), trained_state(module)
    _check_alike(saved, present)
    moments = [load_file(folder / _optimizer_file(i)) for i in range(len(optimizers))]
    for optimizer, tensors in zip(optimizers, moments, strict=True):
        _check_moments(optimizer, tensors)
    for name, value in present.items():
        value.copy_(saved[name])
    for optimizer, tensors in zip(optimizers, moments, strict=True):
        _load_moments(optimizer, tensors)
    return rows


def _check_alike(saved: dict[str, Tensor], present: dict[str, Tensor]) -> None:
    if saved.keys() != present.keys():
        raise ValueError("its parameters have other names")
    for name, value in present.items():
        if (saved[name].shape, saved[name].dtype) != (value.shape, value.dtype):
            raise ValueError(f"{name} is {saved[name].dtype} {list(saved[name].shape)}")


def _check_moments(optimizer: torch.optim.Optimizer, moments: dict[str, Tensor]) -> None:
    """Every moment belongs to a parameter and is a scalar or has its shape."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for key, value in moments.items():
        parameter = parameters[int(key.split(".", 1)[0])] if int(key.split(".", 1)[0]) < len(parameters) else None
        if parameter is None or value.shape not in (parameter.shape, torch.Size()):
            raise ValueError(f"optimizer state {key} is {list(value.shape)}")


def _moments(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Optimizer state as `<parameter number>.<name>`; only tensors, so an optimizer with other state is refused."""
    moments = {}
    for number, values in optimizer.state_dict()["state"].items():
        for name, value in values.items():
            if not isinstance(value, Tensor):
                raise ValueError(f"optimizer state {name!r} is not a tensor: such an optimizer cannot be resumed")
            moments[f"{number}.{name}"] = value
    return moments


def _load_moments(optimizer: torch.optim.Optimizer, moments: dict[str, Tensor]) -> None:
    values: dict[int, dict[str, Tensor]] = {}
    for key, value in moments.items():
        number, name = key.split(".", 1)
        values.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({"state": values, "param_groups": optimizer.state_dict()["param_groups"]})


def _optimizer_file(number: int) -> str:
    return f"optimizer-{number}.safetensors"


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, path)
