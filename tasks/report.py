"""report: accuracy ladder, paired comparisons, training curves and lineage of a run, as one HTML file and as tables."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import Field

from tasks.evaluation.statistics import paired_bootstrap
from tasks.reporting import figures, tables
from tasks.reporting.comparisons import Comparison, comparison_table
from tasks.reporting.data import LadderRow, ReportData, SampleRow, StageRow, TrainingCurve
from tasks.reporting.html import build_report, report_figures
from tasks.stage import Context, Metrics, StageConfig, stage

HTML_FILE, LADDER_FILE, COMPARISONS_FILE = "report.html", "ladder.parquet", "comparisons.parquet"


class ReportBranch(StageConfig):
    """One row of the ladder.  `evaluation`, `test_data` and the values of `logs` name input artifacts."""

    label: str
    scheme: str
    checkpoint: str
    """Digest of the checkpoint that was evaluated."""
    evaluation: str
    test_data: str
    logs: dict[str, str] = Field(default={})
    """Training stage to the artifact that holds its log."""
    command: str = ""


class ReportStage(StageConfig):
    """One distinct stage run of the lineage."""

    role: str
    digest: str
    kind: str
    branches: tuple[str, ...]
    config: dict[str, Any]
    inputs: dict[str, str]


class ReportConfig(StageConfig):
    title: str
    description: str = ""
    reference: str | None = None
    comparisons: tuple[tuple[str, str], ...] = ()
    branches: tuple[ReportBranch, ...]
    stages: tuple[ReportStage, ...]
    samples_per_branch: int = 2


@stage(kind="report")
def report(config: ReportConfig, context: Context, **artifacts: Path) -> Metrics:
    """Write report.html, ladder.parquet, comparisons.parquet and the figures as PNG."""
    samples = {branch.label: read_samples(artifacts[branch.evaluation]) for branch in config.branches}
    data = ReportData(
        title=config.title,
        description=config.description,
        rows=[_row(branch, config.reference, samples, artifacts) for branch in config.branches],
        reference=config.reference,
        comparisons=[_comparison(pair, samples) for pair in config.comparisons],
        curves=list(_curves(config, artifacts)),
        stages=[StageRow(**entry.model_dump()) for entry in config.stages],
        samples=[row for branch in config.branches for row in _sample_rows(branch, config, samples, artifacts)],
    )
    ladder = tables.ladder_table(data.rows)
    (context.output / HTML_FILE).write_text(build_report(data), encoding="utf-8")
    ladder.to_parquet(context.output / LADDER_FILE)
    comparison_table(data.comparisons).to_parquet(context.output / COMPARISONS_FILE)
    for name, _, figure in report_figures(data, ladder):
        (context.output / f"{name}.png").write_bytes(figures.png(figure))
    return {"num_branches": len(config.branches), "num_stages": len(config.stages)}


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
    branch: ReportBranch, reference: str | None, samples: Mapping[str, pd.DataFrame], artifacts: Mapping[str, Path]
) -> LadderRow:
    compared = reference is not None and reference != branch.label
    return LadderRow(
        label=branch.label,
        scheme=branch.scheme,
        evaluation=json.loads((artifacts[branch.evaluation] / "results.json").read_text()),
        digest=branch.checkpoint,
        command=branch.command,
        difference=paired_bootstrap(samples[str(reference)], samples[branch.label]) if compared else None,
    )


def _comparison(pair: tuple[str, str], samples: Mapping[str, pd.DataFrame]) -> Comparison:
    better, worse = pair
    return Comparison(better, worse, **paired_bootstrap(samples[worse], samples[better]))


def _curves(config: ReportConfig, artifacts: Mapping[str, Path]) -> Iterator[TrainingCurve]:
    seen = set()
    for branch in config.branches:
        for stage_name, name in branch.logs.items():
            if name not in seen:
                seen.add(name)
                lines = (artifacts[name] / "training_log.jsonl").read_text().splitlines()
                yield TrainingCurve(branch.label, stage_name, [json.loads(line) for line in lines])


def _sample_rows(
    branch: ReportBranch, config: ReportConfig, samples: Mapping[str, pd.DataFrame], artifacts: Mapping[str, Path]
) -> Iterator[SampleRow]:
    """The first completions of a branch: the same problems for every branch, so that they can be read side by side."""
    problems = pd.read_parquet(artifacts[branch.test_data] / "data.parquet", columns=["id", "prompt"])
    prompts = dict(zip(problems["id"], problems["prompt"], strict=True))
    for row in itertools.islice(samples[branch.label].itertuples(), config.samples_per_branch):
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
