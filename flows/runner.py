"""Run a graph: every node a Prefect task, data dependencies only, each distinct stage once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prefect.futures import PrefectFuture, wait

from artifacts.store import Store
from flows.graph import Graph, Node
from flows.stage_runs import SOURCE_DIGESTS, Resources, stage_run
from tasks.runtime.execute import Outcome
from tasks.runtime.executor import StageExecutor
from tasks.runtime.prefect_tasks import TaskOptions, stage_task
from tasks.runtime.stage import StageConfig


def needs_fresh_process(config: StageConfig, device: str) -> bool:
    """vLLM keeps threads and memory that outlive a stage, and so does CUDA."""
    return device == "cuda" or getattr(config, "engine", None) == "vllm"


def submit_graph(
    graph: Graph, store: Store, executor: StageExecutor, resources: Resources, *, options: dict[str, Any],
    forced: Sequence[str],
) -> dict[str, PrefectFuture[Outcome]]:  # fmt: skip
    """Submit every node of the graph to Prefect; returns the futures by node id.

    Stages that read from outside the store go first, and the error of one is raised before any other is submitted: what
    is missing is told before compute is spent.
    """
    runs = {node.id: stage_run(node, store, resources.device, forced) for node in graph.nodes.values()}
    given = {identity: Outcome(ref, cached=True) for identity, ref in graph.given.items()}
    futures: dict[str, PrefectFuture[Outcome]] = {}

    def submit(node: Node) -> None:
        task_options = TaskOptions(
            executor, fresh_process=needs_fresh_process(node.config, resources.device), **options
        )
        inputs = {name: futures.get(upstream) or given[upstream] for name, upstream in node.inputs.items()}
        futures[node.id] = stage_task(node.stage).submit(node.label, runs[node.id], task_options, inputs)

    for node in (outside := [node for node in graph.nodes.values() if node.stage.name in SOURCE_DIGESTS]):
        submit(node)
    wait(list(futures.values()))
    for node in outside:
        futures[node.id].result()
    for node in graph.nodes.values():
        if node.id not in futures:
            submit(node)
    return futures
