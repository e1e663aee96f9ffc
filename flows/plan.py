"""What a run would do, without doing it: HIT or MISS for every stage, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from artifacts.collector import paused
from artifacts.refs import Ref
from artifacts.store import Store
from flows.graph import Graph, Node
from flows.stage_runs import stage_run
from tasks.runtime.machine import version_differences


@dataclass(frozen=True)
class Planned:
    """One stage of the plan; `ref` is known for hits only."""

    node: Node
    status: str
    reason: str
    ref: Ref | None = None


@paused()
def plan_graph(graph: Graph, store: Store, forced: Sequence[str] = ()) -> list[Planned]:
    """Resolve every node against the store, in the order of the data flow.

    A stage whose inputs are not there yet is a MISS that may still turn into a hit (early cut-off): when the stage
    before it yields the same content as before, its key is the same.
    """
    planned: list[Planned] = []
    known = dict(graph.given)
    for node in graph.nodes.values():
        item = _plan_node(node, graph, known, store, forced)
        planned.append(item)
        if item.ref is not None:
            known[node.id] = item.ref
    return planned


def _plan_node(node: Node, graph: Graph, known: Mapping[str, Ref], store: Store, forced: Sequence[str]) -> Planned:
    waiting = {graph.nodes[identity].role for identity in node.inputs.values() if identity not in known}
    if waiting:
        return Planned(node, "MISS", f"waits for {', '.join(sorted(waiting))}")
    run = stage_run(node, store, "cpu", forced)  # finds the code, which takes its time, of stages that have a key alone
    payload = replace(run, inputs={name: known[identity] for name, identity in node.inputs.items()}).payload()
    key = store.key(payload)
    if run.force:
        return Planned(node, "MISS", "forced")
    record = store.lookup(key)
    if record is not None:
        seconds = record.provenance.get("wall_seconds", 0.0)
        since = "".join(f"; {change}" for change in version_differences(record))
        return Planned(node, "HIT", f"saves {seconds:,.0f} s{since}", record.ref)
    why = store.explain(key)
    nearest = store.nearest(payload, run.definitions) if why == "no record" else None
    if nearest is not None:
        why = "; ".join(nearest[1][:3])
    return Planned(node, "MISS", why)
