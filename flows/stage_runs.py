"""From a node of the graph to something a worker can execute; and what this machine has to execute it on."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from artifacts.refs import Ref
from artifacts.store import Store
from flows.graph import Node, build_graph, check_stage_names
from flows.recipes import configured
from tasks.base_model import local_folder
from tasks.ptq_init import check_fits
from tasks.runtime.execute import StageRun


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
        device = _device()
        jobs = jobs or (1 if device == "cuda" else min(cores, 4))
        threads = max(1, cores // jobs)
        if (limit := os.environ.get("OMP_NUM_THREADS", "")).isdigit():
            threads = min(threads, max(1, int(limit)))
        return cls(device, jobs, threads)


def _device() -> str:
    import torch  # takes seconds, and few commands need it

    return "cuda" if torch.cuda.is_available() else "cpu"


def stage_run(node: Node, store: Store, device: str, forced: Sequence[str]) -> StageRun:
    """The node as something to execute; its inputs are filled in once they are known.

    Raises StageError when what the stage reads from outside is missing, before any compute is spent.
    """
    digest_of = node.stage.source_digest
    return StageRun(
        stage=node.stage,
        config=node.config,
        inputs={},
        store_root=store.root,
        device=device,
        force=node.is_called(forced),
        source_digest=digest_of(node.config) if digest_of else None,
    )


def check_request(
    recipe: str, sets: Sequence[str], branches: Sequence[str], checkpoint: str | None, stages: Sequence[str]
) -> None:
    """Tell bad input before any compute is spent: unknown names, values that do not fit, what is missing here.

    Raises ConfigError, StageError or StoreError.
    """
    check_stage_names(stages)
    run, store = configured(recipe, sets, branches, checkpoint), Store()
    for node in build_graph(run).nodes.values():
        stage_run(node, store, "cpu", [])
        if node.stage.check is not None:
            node.stage.check(node.config)
    for branch in run.branches.values():
        folder = None
        if branch.base_model is not None:
            folder = local_folder(branch.base_model.model)
        elif branch.checkpoint is not None:
            folder = store.folder(Ref("checkpoint", branch.checkpoint))
        if branch.ptq_init is not None and folder is not None:
            check_fits(branch.ptq_init, folder)
