"""The workflow of a run: the union of its branches, each distinct stage once, in the order of the data flow."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from artifacts.keys import digest
from artifacts.refs import Ref
from flows.config import BranchConfig, ConfigError, RunConfig, nearest
from tasks.base_model import base_model
from tasks.calibrate import calibrate
from tasks.data.benchmarks import BENCHMARKS, HUB, BenchmarkName
from tasks.dataset import DatasetConfig, dataset
from tasks.evaluate import EvaluateConfig, evaluate
from tasks.evaluation.config import UNSAMPLED
from tasks.grpo_train import grpo_train
from tasks.kd_train import kd_train
from tasks.pretrain import pretrain
from tasks.ptq_init import ptq_init
from tasks.runtime.stage import Stage, StageConfig
from tasks.sft_train import sft_train
from tasks.teacher_topk import teacher_topk

STAGES: dict[str, Stage] = {
    s.name: s
    for s in (
        base_model,
        pretrain,
        dataset,
        calibrate,
        ptq_init,
        teacher_topk,
        sft_train,
        kd_train,
        grpo_train,
        evaluate,
    )
}
STAGE_ORDER = ("calibrate", "ptq_init", "teacher_topk", "sft_train", "kd_train", "grpo_train", "evaluate", "report")


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


def evaluation_roles(roles: Iterable[str]) -> list[tuple[str, str]]:
    """(evaluation, its problems) of a branch among the branch's roles: its own evaluation and one per benchmark."""
    evaluations = [role for role in roles if role.partition(":")[0] == "evaluate"]
    return [(role, role.replace("evaluate", "test_data", 1)) for role in evaluations]


def build_graph(run: RunConfig, until: str | None = None) -> Graph:
    """The union of the run's branches; with `until`, without what comes after that stage.

    Raises ConfigError for an unknown stage name.
    """
    if until is not None:
        check_stage_names([until])
    graph = Graph()
    for label, branch in run.branches.items():
        _add_branch(graph, label, _cut(branch, until))
    return graph


def check_stage_names(names: Iterable[str]) -> None:
    """Raise ConfigError for a name that is no stage."""
    valid = (*STAGES, "report")
    for name in names:
        if name not in valid:
            raise ConfigError(f"unknown stage {name!r}; {nearest(name, valid)}")


def _cut(branch: BranchConfig, until: str | None) -> BranchConfig:
    if until not in STAGE_ORDER:
        return branch
    after = [s for s in STAGE_ORDER[STAGE_ORDER.index(until) + 1 :] if s in BranchConfig.model_fields]
    return branch.model_copy(update=dict.fromkeys(after))


def _add_branch(graph: Graph, label: str, branch: BranchConfig) -> None:
    def add(role: str, stage: Stage, config: StageConfig, **inputs: str) -> str:
        return graph.add(label, role, stage, config, **inputs)

    def data(role: str) -> str:
        return add(role, dataset, getattr(branch, role))

    if branch.checkpoint is not None:
        base = graph.give(Ref("checkpoint", branch.checkpoint))
    elif branch.pretrain is not None:
        base = add("pretrain", pretrain, branch.pretrain)
    else:
        assert branch.base_model is not None
        base = add("base_model", base_model, branch.base_model)
    student, inputs = base, {"base": base}
    if branch.calibrate is not None:
        inputs["calibration"] = add("calibrate", calibrate, branch.calibrate, base=base, data=data("calibration_data"))
    if branch.ptq_init is not None:
        student = add("ptq_init", ptq_init, branch.ptq_init, **inputs)
    student = _add_training(add, data, branch, base, student)
    if branch.evaluate is None:
        return
    if branch.test_data is not None:
        add("evaluate", evaluate, branch.evaluate, checkpoint=student, data=data("test_data"))
    for name in branch.benchmarks:
        config = DatasetConfig(benchmark=name, source=branch.benchmark_data or HUB)
        problems = add(f"test_data:{name}", dataset, config)
        add(f"evaluate:{name}", evaluate, on_benchmark(branch.evaluate, name), checkpoint=student, data=problems)


def on_benchmark(config: EvaluateConfig, name: BenchmarkName) -> EvaluateConfig:
    """An evaluation's settings, on a published benchmark; those that mean nothing to it are left at one value."""
    benchmark = BENCHMARKS[name]
    asked: dict[str, Any] = {"name": name, "kind": benchmark.kind, "prompt_suffix": benchmark.prompt_suffix}
    if benchmark.kind == "loglikelihood":
        asked |= {**UNSAMPLED, "seeds": config.seeds[:1]}
    if benchmark.kind != "code":
        asked["unsafe_code"] = False
    return config.model_copy(update=asked)


def _add_training(add, data, branch: BranchConfig, base: str, student: str) -> str:  # type: ignore[no-untyped-def]
    if branch.sft_train is not None:
        student = add("sft_train", sft_train, branch.sft_train, student=student, data=data("train_data"))
    if branch.kd_train is not None:
        inputs = {"student": student, "teacher": base, "data": data("train_data")}
        if branch.teacher_topk is not None:
            inputs["teacher_topk"] = add(
                "teacher_topk", teacher_topk, branch.teacher_topk, teacher=base, data=inputs["data"]
            )
        student = add("kd_train", kd_train, branch.kd_train, **inputs)
    if branch.grpo_train is not None:
        student = add("grpo_train", grpo_train, branch.grpo_train, student=student, data=data("rl_data"))
    return student
