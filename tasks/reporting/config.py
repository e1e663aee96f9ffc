"""Configuration of the report stage: which artifacts make which rows."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from tasks.runtime.bounds import Whole
from tasks.runtime.stage import StageConfig


class ReportEvaluation(StageConfig):
    """One benchmark of a branch, and the names of the input artifacts that hold it."""

    benchmark: str
    evaluation: str
    test_data: str


class ReportBranch(StageConfig):
    """One row of the ladder.  The values of `logs` name input artifacts."""

    label: str
    scheme: str
    checkpoint: str
    """Digest of the checkpoint that was evaluated."""
    evaluations: tuple[ReportEvaluation, ...]
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
    samples_per_branch: Whole = 2
