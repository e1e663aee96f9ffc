"""Paired differences between two branches, as numbers and as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import pandas as pd

COLUMNS = ("better", "worse", "difference", "low", "high", "p_value", "problems")


@dataclass(frozen=True)
class Comparison:
    """Accuracy of `better` minus that of `worse` on the same problems; fractions."""

    better: str
    worse: str
    diff: float
    ci95: Sequence[float]
    p_value: float
    num_problems: int


def comparison_table(comparisons: Sequence[Comparison]) -> pd.DataFrame:
    """One row per pair: difference and its 95% interval in percentage points, p-value, number of problems."""
    rows = []
    for entry in map(asdict, comparisons):
        low, high = entry["ci95"]
        points = [100 * value for value in (entry["diff"], low, high)]
        rows.append([entry["better"], entry["worse"], *points, entry["p_value"], entry["num_problems"]])
    return pd.DataFrame(rows, columns=list(COLUMNS))


def comparison_text(table: pd.DataFrame) -> pd.DataFrame:
    """`comparison_table` for people; a difference whose interval includes 0 is called noise."""
    return pd.DataFrame(
        {
            "comparison": [f"{row.better}  -  {row.worse}" for row in table.itertuples()],
            "points [95%]": [f"{r.difference:+.1f} [{r.low:+.1f}, {r.high:+.1f}]" for r in table.itertuples()],
            "p": [f"{row.p_value:.2g}" for row in table.itertuples()],
            "verdict": ["within noise" if r.low <= 0 <= r.high else "differs" for r in table.itertuples()],
            "problems": [str(row.problems) for row in table.itertuples()],
        }
    )
