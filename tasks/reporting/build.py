"""From the artifacts of a run to its report: rows, comparisons, curves and samples, then the files."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from tasks.evaluation.statistics import paired_bootstrap
from tasks.reporting import figures, tables
from tasks.reporting.comparisons import comparison_table
from tasks.reporting.config import ReportBranch, ReportConfig, ReportEvaluation
from tasks.reporting.data import Comparison, LadderRow, ReportData, SampleRow, StageRow, TrainingCurve
from tasks.reporting.html import build_report, report_figures
from tasks.runtime.stage import Context, Metrics
from tasks.training.config import LOG_FILE

HTML_FILE, LADDER_FILE, COMPARISONS_FILE = "report.html", "ladder.parquet", "comparisons.parquet"


def write_report(config: ReportConfig, context: Context, artifacts: Mapping[str, Path]) -> Metrics:
    """The body of `report`."""
    samples = {
        (branch.label, part.benchmark): read_samples(artifacts[part.evaluation])
        for branch, part in _evaluations(config)
    }
    data = ReportData(
        title=config.title,
        description=config.description,
        rows=[_row(branch, part, config.reference, samples, artifacts) for branch, part in _evaluations(config)],
        reference=config.reference,
        comparisons=[found for pair in config.comparisons for found in _comparisons(pair, samples)],
        curves=list(_curves(config, artifacts)),
        stages=[StageRow(**entry.model_dump()) for entry in config.stages],
        samples=[
            row
            for branch, part in _evaluations(config)
            for row in _sample_rows(branch, part, config.samples_per_branch, samples, artifacts)
        ],
    )
    ladder = tables.ladder_table(data.rows)
    (context.output / HTML_FILE).write_text(build_report(data), encoding="utf-8")
    ladder.to_parquet(context.output / LADDER_FILE)
    comparison_table(data.comparisons).to_parquet(context.output / COMPARISONS_FILE)
    for name, _, figure in report_figures(data, ladder):
        (context.output / f"{name}.png").write_bytes(figures.png(figure))
    return {"num_branches": len(config.branches), "num_stages": len(config.stages)}


Samples = Mapping[tuple[str, str], pd.DataFrame]
"""Samples of an evaluation by branch and benchmark."""


def _evaluations(config: ReportConfig) -> Iterator[tuple[ReportBranch, ReportEvaluation]]:
    for branch in config.branches:
        for part in branch.evaluations:
            yield branch, part


def read_samples(evaluation: Path) -> pd.DataFrame:
    """The samples of an evaluation artifact, without the token ids."""
    columns = [
        "problem_id",
        "seed",
        "gold",
        "extracted",
        "correct",
        "finish_reason",
        "num_output_tokens",
        "output_text",
    ]
    return pd.read_parquet(evaluation / "samples.parquet", columns=columns)


def _row(
    branch: ReportBranch,
    part: ReportEvaluation,
    reference: str | None,
    samples: Samples,
    artifacts: Mapping[str, Path],
) -> LadderRow:
    compared = None if reference == branch.label else samples.get((str(reference), part.benchmark))
    return LadderRow(
        label=branch.label,
        scheme=branch.scheme,
        evaluation=json.loads((artifacts[part.evaluation] / "results.json").read_text()),
        digest=branch.checkpoint,
        command=branch.command,
        difference=None if compared is None else _paired(compared, samples[branch.label, part.benchmark]),
    )


def _comparisons(pair: tuple[str, str], samples: Samples) -> Iterator[Comparison]:
    """The pair on every benchmark that both have."""
    better, worse = pair
    for label, benchmark in samples:
        if label == better and (worse, benchmark) in samples:
            paired = _paired(samples[worse, benchmark], samples[better, benchmark])
            if paired is not None:
                yield Comparison(better, worse, benchmark, **paired)


def _paired(before: pd.DataFrame, after: pd.DataFrame) -> dict[str, Any] | None:
    """The paired difference over the samples (problem, seed) that both have; None where there are none."""
    keys = ["problem_id", "seed"]
    common = before[keys].merge(after[keys], on=keys)
    if common.empty:
        return None
    return paired_bootstrap(before.merge(common, on=keys), after.merge(common, on=keys))


def _curves(config: ReportConfig, artifacts: Mapping[str, Path]) -> Iterator[TrainingCurve]:
    seen = set()
    for branch in config.branches:
        for stage_name, name in branch.logs.items():
            if name not in seen:
                seen.add(name)
                lines = (artifacts[name] / LOG_FILE).read_text().splitlines()
                yield TrainingCurve(branch.label, stage_name, [json.loads(line) for line in lines])


def _sample_rows(
    branch: ReportBranch, part: ReportEvaluation, num: int, samples: Samples, artifacts: Mapping[str, Path]
) -> Iterator[SampleRow]:
    """The first completions of a branch: the same problems for every branch, so that they can be read side by side."""
    problems = pd.read_parquet(artifacts[part.test_data] / "data.parquet", columns=["id", "prompt"])
    prompts = dict(zip(problems["id"], problems["prompt"], strict=True))
    for row in itertools.islice(samples[branch.label, part.benchmark].itertuples(), num):
        yield SampleRow(
            label=branch.label,
            problem_id=row.problem_id,
            prompt=prompts[row.problem_id],
            text=row.output_text,
            gold=row.gold,
            extracted=row.extracted if isinstance(row.extracted, str) else None,
            correct=bool(row.correct),
            finish_reason=row.finish_reason,
            num_output_tokens=int(row.num_output_tokens),
        )
