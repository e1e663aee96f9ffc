"""From a node of the graph to something a worker can execute; and what this machine has to execute it on."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from artifacts.store import Store
from flows.graph import Node
from tasks import base_model, dataset
from tasks.runtime.execute import StageRun

SOURCE_DIGESTS: dict[str, Callable[[Any], str]] = {
    "base_model": base_model.source_digest,
    "dataset": dataset.source_digest,
}
"""Stages that read from outside the store, with the function that digests what they read."""


@dataclass(frozen=True)
class Resources:
    """Device, number of concurrent stages, and threads of each."""

    device: str
    jobs: int
    num_threads: int

    @classmethod
    def detect(cls, jobs: int | None = None) -> Resources:
        """One stage at a time on a GPU; on a CPU stages side by side with one core each, as small models like it."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        device = "cuda" if torch.cuda.is_available() else "cpu"
        jobs = jobs or (1 if device == "cuda" else min(cores, 4))
        threads = max(1, cores // jobs)
        if (limit := os.environ.get("OMP_NUM_THREADS", "")).isdigit():
            threads = min(threads, max(1, int(limit)))
        return cls(device, jobs, threads)


def stage_run(node: Node, store: Store, device: str, forced: Sequence[str]) -> StageRun:
    """The node as something to execute; its inputs are filled in once they are known.

    Raises StageError when what the stage reads from outside is missing, before any compute is spent.
    """
    digest_of = SOURCE_DIGESTS.get(node.stage.name)
    return StageRun(
        stage=node.stage,
        config=node.config,
        inputs={},
        store_root=store.root,
        device=device,
        force=node.stage.name in forced,
        source_digest=digest_of(node.config) if digest_of else None,
    )
