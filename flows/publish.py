"""Results in the Prefect UI: tables, figures and lineage as Prefect artifacts, for cached stages too."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
from prefect.artifacts import create_image_artifact, create_markdown_artifact, create_table_artifact

from flows.config import RunConfig
from flows.graph import Graph
from tasks.reporting import figures, tables
from tasks.reporting.build import COMPARISONS_FILE, LADDER_FILE
from tasks.reporting.comparisons import comparison_text
from tasks.runtime.execute import Outcome


def publish_report(run: RunConfig, folder: Path) -> None:
    """Publish a report artifact from inside the flow: a cached stage's body does not run, so it cannot."""
    name = run.name.replace("_", "-")
    ladders = tables.by_benchmark(pd.read_parquet(folder / LADDER_FILE))
    texts = {benchmark: tables.ladder_text(rows, run.reference) for benchmark, rows in ladders.items()}
    rows = [{"benchmark": benchmark, **row} for benchmark, text in texts.items() for row in _rows(text)]
    create_table_artifact(table=rows, key=f"{name}-accuracy", description=run.description)
    comparisons = comparison_text(pd.read_parquet(folder / COMPARISONS_FILE))
    sections = "\n".join(f"## {benchmark}\n\n{tables.markdown(text)}" for benchmark, text in texts.items())
    markdown = f"# {run.name}\n\n{run.description}\n\n{sections}\n`~`: within noise\n"
    if len(comparisons):
        markdown += f"\n## Paired differences\n\n{tables.markdown(comparisons)}"
    create_markdown_artifact(markdown=markdown, key=f"{name}-report")
    for file in sorted(folder.glob("*.png")):
        image = figures.data_uri(file.read_bytes())
        create_image_artifact(image_url=image, key=f"{name}-{_key(file.stem)}", description=file.stem)


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


def _key(text: str) -> str:
    """Prefect's keys are lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower())


def _short(metrics: dict[str, Any]) -> dict[str, Any]:
    return {k: round(v, 5) for k, v in metrics.items() if isinstance(v, int | float)}


def _rows(table: pd.DataFrame) -> list[dict[str, str]]:
    return [{str(k): str(v) for k, v in row.items()} for row in table.to_dict("records")]
