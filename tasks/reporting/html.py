"""The report of a run as one HTML file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
from markupsafe import Markup
from matplotlib.figure import Figure

from tasks.reporting import figures, tables
from tasks.reporting.comparisons import comparison_table, comparison_text
from tasks.reporting.data import SHORT_DIGEST, ReportData, StageRow, TrainingCurve
from tasks.reporting.page import cells, render, shortened

TEMPLATE = "report.html.j2"


def build_report(data: ReportData) -> str:
    """The HTML page of `data`: the same data give the same bytes."""
    table = tables.ladder_table(data.rows)
    return render(
        TEMPLATE,
        title=data.title,
        report=data,
        overview=cells(tables.overview_text(table)),
        ladders={
            name: cells(tables.ladder_text(rows, data.reference)) for name, rows in tables.by_benchmark(table).items()
        },
        comparisons=cells(comparison_text(comparison_table(data.comparisons))),
        # matplotlib escapes the text it writes, so the element is safe to stand as it is.
        figures=[(caption, Markup(figures.svg(figure))) for _, caption, figure in report_figures(data, table)],
        lineage=_lineage(data.stages),
        stages=[(anchor, stage, dict(_flatten(stage.config))) for anchor, stage in _anchored(data.stages)],
        samples=[replace(sample, text=shortened(sample.text)) for sample in data.samples],
        # One for each branch, which has a row for each benchmark.
        commands={row.label: row for row in data.rows if row.command},
        short=lambda digest: digest[:SHORT_DIGEST],
    )


def report_figures(data: ReportData, table: pd.DataFrame) -> list[tuple[str, str, Figure]]:
    """(name, caption, figure) of every figure there is data for."""
    drawn = [
        (f"ladder_{name}", f"Accuracy of each branch, {name}", figures.ladder_figure(rows))
        for name, rows in tables.by_benchmark(table).items()
    ]
    rl = [curve for curve in data.curves if _has(curve, "reward_mean")]
    supervised = [curve for curve in data.curves if curve not in rl and _has(curve, "loss")]
    for stage in dict.fromkeys(curve.stage for curve in supervised):
        of_stage = [curve for curve in supervised if curve.stage == stage]
        drawn.append((stage, f"Training loss, {stage}", figures.curves_figure(of_stage, figures.LOSS_PANELS)))
    if rl:
        drawn.append(("grpo_train", "Reinforcement learning", figures.curves_figure(rl, figures.GRPO_PANELS)))
    return drawn


def _has(curve: TrainingCurve, field: str) -> bool:
    return any(row.get(field) is not None for row in curve.rows)


def _anchored(stages: Sequence[StageRow]) -> list[tuple[str, StageRow]]:
    return [(f"stage-{index}", stage) for index, stage in enumerate(stages)]


def _lineage(stages: Sequence[StageRow]) -> dict[str, Any]:
    """Branch x role: (anchor, stage) in each cell, None where a branch has no such stage."""
    roles = list(dict.fromkeys(stage.role for stage in stages))
    branches = list(dict.fromkeys(branch for stage in stages for branch in stage.branches))
    at = {(branch, stage.role): (anchor, stage) for anchor, stage in _anchored(stages) for branch in stage.branches}
    return {
        "roles": roles,
        "rows": [(branch, [at.get((branch, role)) for role in roles]) for branch in branches],
    }


def _flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """("optimizer.lr", 1e-5) pairs of nested mappings."""
    pairs: list[tuple[str, Any]] = []
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            pairs.extend(_flatten(value, f"{prefix}{name}."))
        else:
            pairs.append((f"{prefix}{name}", value))
    return pairs
