"""Run a graph: every node a Prefect task, data dependencies only, each distinct stage once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prefect.futures import PrefectFuture, wait

from artifacts.store import Store
from flows.graph import Graph, Node
from flows.stage_runs import Resources, stage_run
from tasks.runtime.execute import Outcome
from tasks.runtime.executor import StageExecutor
from tasks.runtime.prefect_tasks import TaskOptions, stage_task


def needs_fresh_process(node: Node, device: str) -> bool:
    """CUDA's memory outlives a stage, and what the stage itself names."""
    return device == "cuda" or node.stage.fresh_process(node.config)


def submit_graph(
    graph: Graph, store: Store, executor: StageExecutor, resources: Resources, *, options: dict[str, Any],
    forced: Sequence[str],
) -> dict[str, PrefectFuture[Outcome]]:  # fmt: skip
    """Submit every node of the graph to Prefect; returns the futures by node id.

    Stages that read from outside the store go first, and the error of one is raised before any other is submitted: what
    is missing is told before compute is spent, and so is what this machine lacks.
    """
    for node in graph.nodes.values():
        if node.stage.check is not None:
            node.stage.check(node.config)
    runs = {node.id: stage_run(node, store, resources.device, forced) for node in graph.nodes.values()}
    given = {identity: Outcome(ref, cached=True) for identity, ref in graph.given.items()}
    futures: dict[str, PrefectFuture[Outcome]] = {}

    def submit(node: Node) -> None:
        task_options = TaskOptions(executor, fresh_process=needs_fresh_process(node, resources.device), **options)
        inputs = {name: futures.get(upstream) or given[upstream] for name, upstream in node.inputs.items()}
        futures[node.id] = stage_task(node.stage).submit(node.label, runs[node.id], task_options, inputs)

    for node in (outside := [node for node in graph.nodes.values() if node.stage.source_digest]):
        submit(node)
    wait(list(futures.values()))
    for node in outside:
        futures[node.id].result()
    for node in graph.nodes.values():
        if node.id not in futures:
            submit(node)
    return futures
