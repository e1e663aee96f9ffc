"""The workflow of a run: the union of its branches, each distinct stage once, in the order of the data flow."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from artifacts.keys import digest
from artifacts.refs import Ref
from flows.branches import SECTIONS, STAGES, BranchConfig
from flows.config import ConfigError, RunConfig, nearest
from tasks.data.benchmarks import BENCHMARKS, HUB, BenchmarkName
from tasks.dataset import DatasetConfig, dataset
from tasks.evaluate import evaluate
from tasks.evaluation.config import UNSAMPLED, EvaluateConfig
from tasks.runtime.stage import Stage, StageConfig

REPORT = "report"
STAGE_NAMES = (*dict.fromkeys([*STAGES, *SECTIONS]), REPORT)
"""What --until and --force take: stages, and the branch sections that are data sets."""


@dataclass(frozen=True)
class Node:
    """One distinct stage of the run.  `id` is the same whenever configuration and upstream are the same."""

    id: str
    role: str
    stage: Stage
    config: StageConfig
    inputs: dict[str, str]
    branches: list[str] = field(default_factory=list, compare=False)

    @property
    def label(self) -> str:
        more = f" +{len(self.branches) - 1}" if len(self.branches) > 1 else ""
        return f"{self.role} [{self.branches[0]}{more}]"

    def is_called(self, names: Iterable[str]) -> bool:
        """Whether one of the names is its stage's, or its section's."""
        return bool({self.stage.name, self.role.partition(":")[0]} & set(names))


@dataclass
class Graph:
    """Nodes in the order of the data flow, and for each branch its nodes by role."""

    nodes: dict[str, Node] = field(default_factory=dict)
    given: dict[str, Ref] = field(default_factory=dict)
    """Artifacts that are in the store already, by the id that nodes name as their input."""
    roles: dict[str, dict[str, str]] = field(default_factory=dict)

    def add(self, branch: str, role: str, stage: Stage, config: StageConfig, **inputs: str) -> str:
        identity = digest({"stage": stage.name, "config": config.model_dump(mode="json"), "inputs": inputs})
        node = self.nodes.setdefault(identity, Node(identity, role, stage, config, inputs))
        if branch not in node.branches:
            node.branches.append(branch)
        self.roles.setdefault(branch, {})[role] = identity
        return identity

    def give(self, ref: Ref) -> str:
        self.given[str(ref)] = ref
        return str(ref)

    def num_stages_unshared(self) -> int:
        """How many stages would run if no branch shared any."""
        return sum(len(set(roles.values())) for roles in self.roles.values())

    def until(self, name: str) -> Graph:
        """The part that the stage or section of this name needs, itself included; ConfigError if there is none."""
        kept = {identity for identity, node in self.nodes.items() if node.is_called([name])}
        if not kept:
            raise ConfigError(f"no selected branch has a stage {name!r}; {nearest(name, self._names())}")
        for identity in reversed(self.nodes):
            if identity in kept:
                kept.update(self.nodes[identity].inputs.values())
        nodes = {identity: node for identity, node in self.nodes.items() if identity in kept}
        roles = {
            label: {role: identity for role, identity in by_role.items() if identity in kept}
            for label, by_role in self.roles.items()
        }
        return Graph(nodes, self.given, {label: by_role for label, by_role in roles.items() if by_role})

    def _names(self) -> list[str]:
        return list(dict.fromkeys(node.stage.name for node in self.nodes.values()))


def evaluation_roles(roles: Iterable[str]) -> list[tuple[str, str]]:
    """(evaluation, its problems) of a branch among the branch's roles: its own evaluation and one per benchmark."""
    evaluations = [role for role in roles if role.partition(":")[0] == "evaluate"]
    return [(role, role.replace("evaluate", "test_data", 1)) for role in evaluations]


def build_graph(run: RunConfig, until: str | None = None) -> Graph:
    """The union of the run's branches; with `until`, that stage and what it needs.

    Raises ConfigError for an unknown stage name, and for one that no branch has.
    """
    if until is not None:
        check_stage_names([until])
    graph = Graph()
    for label, branch in run.branches.items():
        _add_branch(graph, label, branch)
    return graph if until in (None, REPORT) else graph.until(str(until))


def check_stage_names(names: Iterable[str]) -> None:
    """Raise ConfigError for a name that is no stage."""
    for name in names:
        if name not in STAGE_NAMES:
            raise ConfigError(f"unknown stage {name[:60]!r}; {nearest(name, STAGE_NAMES)}")


def _add_branch(graph: Graph, label: str, branch: BranchConfig) -> None:
    """Each section by its stage's declaration: its inputs from the slots that earlier ones gave."""
    slots: dict[str, str] = {}
    if branch.checkpoint is not None:
        slots = dict.fromkeys(("base", "model"), graph.give(Ref("checkpoint", branch.checkpoint)))
    sections = list(branch.sections())
    wanted = {slot for _, stage, _ in sections for slot in stage.reads.values()}
    for name, stage, config in sections:
        is_data = not stage.gives and not stage.reads
        if is_data and name not in wanted:
            continue
        if isinstance(config, EvaluateConfig):
            _add_evaluations(graph, label, branch, config, slots)
            continue
        inputs = {input_name: slots[slot] for input_name, slot in stage.reads.items() if slot in slots}
        identity = graph.add(label, name, stage, config, **inputs)
        slots |= dict.fromkeys((name,) if is_data else stage.gives, identity)


def _add_evaluations(
    graph: Graph, label: str, branch: BranchConfig, config: EvaluateConfig, slots: dict[str, str]
) -> None:
    """The branch's own test set, where it has one, and each benchmark."""
    model = slots["model"]
    if "test_data" in slots:
        graph.add(label, "evaluate", evaluate, config, checkpoint=model, data=slots["test_data"])
    for name in branch.benchmarks:
        source = DatasetConfig(benchmark=name, source=branch.benchmark_data or HUB)
        problems = graph.add(label, f"test_data:{name}", dataset, source)
        graph.add(label, f"evaluate:{name}", evaluate, on_benchmark(config, name), checkpoint=model, data=problems)


def on_benchmark(config: EvaluateConfig, name: BenchmarkName) -> EvaluateConfig:
    """An evaluation's settings, on a published benchmark; those that mean nothing to it are left at one value."""
    benchmark = BENCHMARKS[name]
    generation: dict[str, Any] = {"prompt_suffix": benchmark.prompt_suffix}
    asked: dict[str, Any] = {"name": name, "kind": benchmark.kind}
    if benchmark.kind == "loglikelihood":
        generation |= UNSAMPLED
        asked["seeds"] = config.seeds[:1]
    if benchmark.kind != "code":
        asked["unsafe_code"] = False
    return config.model_copy(update=asked | {"generation": config.generation.model_copy(update=generation)})
