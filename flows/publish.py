"""Results in the Prefect UI: tables, figures and lineage as Prefect artifacts, for cached stages too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
from prefect.artifacts import create_image_artifact, create_markdown_artifact, create_table_artifact

from flows.config import RunConfig
from flows.graph import Graph
from tasks.execute import Outcome
from tasks.report import COMPARISONS_FILE, LADDER_FILE
from tasks.reporting import figures, tables
from tasks.reporting.comparisons import comparison_text


def publish_report(run: RunConfig, folder: Path) -> None:
    """Publish a report artifact from inside the flow: a cached stage's body does not run, so it cannot."""
    name = run.name.replace("_", "-")
    ladder = tables.ladder_text(pd.read_parquet(folder / LADDER_FILE), run.reference)
    create_table_artifact(table=_rows(ladder), key=f"{name}-accuracy", description=run.description)
    comparisons = comparison_text(pd.read_parquet(folder / COMPARISONS_FILE))
    markdown = f"# {run.name}\n\n{run.description}\n\n{tables.markdown(ladder)}"
    if len(comparisons):
        markdown += f"\n## Paired differences\n\n{tables.markdown(comparisons)}"
    create_markdown_artifact(markdown=markdown, key=f"{name}-report")
    for file in sorted(folder.glob("*.png")):
        image = figures.data_uri(file.read_bytes())
        create_image_artifact(image_url=image, key=f"{name}-{file.stem.replace('_', '-')}", description=file.stem)


def publish_lineage(run: RunConfig, graph: Graph, outcomes: dict[str, Outcome]) -> None:
    """A table of every stage: its artifact, whether it was cached, and its result."""
    rows = [
        {
            "stage": node.label,
            "artifact": f"{outcomes[node.id].ref.kind} {outcomes[node.id].ref.short}",
            "cached": "yes" if outcomes[node.id].cached else "no",
            "result": json.dumps(_short(outcomes[node.id].metrics)),
        }
        for node in graph.nodes.values()
    ]
    create_table_artifact(table=rows, key=f"{run.name.replace('_', '-')}-stages", description="lineage of this run")


def _short(metrics: dict[str, Any]) -> dict[str, Any]:
    return {k: round(v, 5) for k, v in metrics.items() if isinstance(v, int | float)}


def _rows(table: pd.DataFrame) -> list[dict[str, str]]:
    return [{str(k): str(v) for k, v in row.items()} for row in table.to_dict("records")]
