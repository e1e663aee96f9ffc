"""What a report is made of: plain records, filled from artifacts by the caller."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SHORT_DIGEST = 12  # characters shown of a digest


@dataclass(frozen=True)
class LadderRow:
    """One evaluated branch."""

    label: str
    scheme: str
    evaluation: Mapping[str, Any]
    """results.json of the evaluation artifact."""
    digest: str
    """Of the checkpoint that was evaluated."""
    command: str = ""
    """Runs this row again."""
    difference: Mapping[str, Any] | None = None
    """Accuracy minus the reference's, paired by problem: {diff, ci95, p_value}; None if not compared."""


@dataclass(frozen=True)
class Comparison:
    """Accuracy of `better` minus that of `worse` on the same problems; fractions."""

    better: str
    worse: str
    benchmark: str
    diff: float
    ci95: Sequence[float]
    p_value: float
    num_problems: int


@dataclass(frozen=True)
class TrainingCurve:
    """The log of one training stage."""

    label: str
    stage: str
    rows: Sequence[Mapping[str, Any]]
    """training_log.jsonl: one mapping per logged step, with "step"; a value that is not known is None."""


@dataclass(frozen=True)
class StageRow:
    """One distinct stage run and the branches that share it."""

    role: str
    digest: str
    kind: str
    branches: Sequence[str]
    config: Mapping[str, Any]
    inputs: Mapping[str, str]
    """Input name to reference "kind:digest"."""


@dataclass(frozen=True)
class SampleRow:
    """One completion. `text` is the model's own and hostile until shown otherwise."""

    label: str
    problem_id: str
    prompt: str
    text: str
    gold: str
    extracted: str | None
    correct: bool
    finish_reason: str
    num_output_tokens: int


@dataclass(frozen=True)
class ReportData:
    """Everything in a report, in the order in which it is shown; stages are in the order of the data flow."""

    title: str
    description: str
    rows: Sequence[LadderRow]
    reference: str | None = None
    """Label of the row that the differences are taken against."""
    comparisons: Sequence[Comparison] = ()
    curves: Sequence[TrainingCurve] = ()
    stages: Sequence[StageRow] = ()
    samples: Sequence[SampleRow] = ()
