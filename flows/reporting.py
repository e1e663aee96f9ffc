"""From a finished graph to the report stage, and from its artifact to the terminal and a folder."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

from artifacts.refs import Ref
from artifacts.store import Store
from flows.config import RunConfig
from flows.graph import Graph, evaluation_roles
from tasks.checkpoints.folders import scheme_name
from tasks.evaluation.config import EvaluateConfig
from tasks.report import report
from tasks.reporting import tables
from tasks.reporting.build import COMPARISONS_FILE, HTML_FILE, LADDER_FILE
from tasks.reporting.comparisons import comparison_text
from tasks.reporting.config import ReportBranch, ReportConfig, ReportEvaluation, ReportStage
from tasks.runtime.execute import Outcome, StageRun
from tasks.runtime.stage import StageConfig

WIDE_COLUMNS = ("paper scorer %", "truncated %", "repeating %", "mean length", "entropy", "problems x seeds")
"""Left to the report, so that the table fits a terminal."""


def report_run(
    run: RunConfig, graph: Graph, outcomes: Mapping[str, Outcome], store: Store, *, command: str, force: bool
) -> tuple[StageRun, dict[str, Outcome]]:
    """The report stage of a finished run and its inputs: evaluations, test sets and training logs."""
    inputs: dict[str, Outcome] = {}
    branches = tuple(
        _branch(label, graph, outcomes, inputs, command, store)
        for label, roles in graph.roles.items()
        if evaluation_roles(roles)
    )
    stages = tuple(
        ReportStage(
            role=node.role,
            digest=outcomes[node.id].ref.digest,
            kind=outcomes[node.id].ref.kind,
            branches=tuple(node.branches),
            config=_shown(node.config),
            inputs={name: _ref(upstream, graph, outcomes) for name, upstream in node.inputs.items()},
        )
        for node in graph.nodes.values()
    )
    config = ReportConfig(
        title=run.name, description=run.description, reference=run.reference, comparisons=run.comparisons,
        branches=branches, stages=stages,
    )  # fmt: skip
    return StageRun(report, config, {}, store.root, force=force), inputs


def _shown(config: StageConfig) -> dict[str, Any]:
    """A configuration without what changes no bit of a result, and of a path of this machine its last part alone."""
    places = {name: getattr(config, name) for name in config.location_fields}
    return config.keyed() | {name: Path(at).name if at and Path(at).exists() else at for name, at in places.items()}


def _ref(identity: str, graph: Graph, outcomes: Mapping[str, Outcome]) -> str:
    return str(graph.given.get(identity) or outcomes[identity].ref)


def _branch(
    label: str, graph: Graph, outcomes: Mapping[str, Outcome], inputs: dict[str, Outcome], command: str, store: Store
) -> ReportBranch:
    roles = graph.roles[label]

    def artifact(role: str) -> str:
        outcome = outcomes[roles[role]]
        name = f"{role}_{outcome.ref.short}"
        inputs[name] = outcome
        return name

    def evaluated(role: str, data_role: str) -> ReportEvaluation:
        config = graph.nodes[roles[role]].config
        assert isinstance(config, EvaluateConfig)
        return ReportEvaluation(benchmark=config.name, evaluation=artifact(role), test_data=artifact(data_role))

    pairs = evaluation_roles(roles)
    checkpoint = _ref(graph.nodes[roles[pairs[0][0]]].inputs["checkpoint"], graph, outcomes)
    return ReportBranch(
        label=label,
        scheme=scheme_name(store.folder(Ref.parse(checkpoint))),
        checkpoint=checkpoint.partition(":")[2],
        evaluations=tuple(evaluated(*pair) for pair in pairs),
        logs={role: artifact(role) for role, identity in roles.items() if graph.nodes[identity].stage.log},
        command=command.replace("BRANCH", shlex.quote(label)),
    )


def print_ladder(folder: Path, console: Console) -> None:
    """The ladder and the comparisons of a report artifact, for the terminal."""
    ladder = pd.read_parquet(folder / LADDER_FILE)
    for name, rows in tables.by_benchmark(ladder).items():
        text = tables.ladder_text(rows).drop(columns=["scheme", *WIDE_COLUMNS], errors="ignore")
        shape = ", ".join(dict.fromkeys(f"{r.problems} problems x {r.seeds} seeds" for r in rows.itertuples()))
        console.print(tables.rich_table(text, f"{name}: accuracy, {shape}; ~ is within noise"))
    if ladder["benchmark"].nunique() > 1:
        console.print(tables.rich_table(tables.overview_text(ladder), "all benchmarks"))
    comparisons = pd.read_parquet(folder / COMPARISONS_FILE)
    if len(comparisons):
        console.print(
            tables.rich_table(comparison_text(comparisons), "paired differences, in points; ~ is within noise")
        )


def copy_report(folder: Path, target: Path) -> Path:
    """Copy the files of a report artifact to where a person looks for them; returns the page."""
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(folder.iterdir()):
        if file.name != "MANIFEST.json":
            shutil.copyfile(file, target / file.name)
    return target / HTML_FILE
