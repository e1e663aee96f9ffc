"""report: accuracy ladder, paired comparisons, training curves and lineage of a run, as one HTML file and as tables."""

from __future__ import annotations

from pathlib import Path

from tasks.reporting.config import ReportConfig
from tasks.runtime.stage import Context, Metrics, stage


@stage(kind="report")
def report(config: ReportConfig, context: Context, **artifacts: Path) -> Metrics:
    """Write report.html, ladder.parquet, comparisons.parquet and the figures as PNG."""
    from tasks.reporting.build import write_report

    return write_report(config, context, artifacts)
