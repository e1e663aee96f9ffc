"""Tables: numbers in a DataFrame first, text for people second, so that the numbers can be read back.

`ladder_table` holds percentages and percentage points as floats; `ladder_text` is its text form. `markdown`
and `rich_table` print any table of text.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Sequence
from typing import Any

import pandas as pd
from rich.table import Table
from rich.text import Text

from tasks.reporting.data import SHORT_DIGEST, LadderRow

TIER = "tier "  # prefix of the per-tier columns
ABSENT = "–"  # noqa: RUF001 - an en dash, as in printed tables
FIGURES = re.compile(r"[-+]?\d+(\.\d+)?( \[.*\]| x \d+)?|" + ABSENT)
RESULT_FIELDS = ("accuracy", "ci95", "tiers", "truncation_rate", "mean_length", "num_problems", "seeds")


def ladder_table(rows: Sequence[LadderRow]) -> pd.DataFrame:
    """One row per branch: percentages, points against the reference, token counts. The unknown is NaN.

    Columns: branch, scheme, accuracy, low, high (95% interval), "tier <name>" ..., difference,
    difference_low, difference_high, p_value, truncation, mean_length, problems, seeds, digest, command.
    Raises ValueError for an evaluation that lacks a field.
    """
    tiers = sorted({str(tier) for row in rows for tier in _checked(row)["tiers"]}, key=natural_key)
    return pd.DataFrame([_numbers(row, tiers) for row in rows], columns=_columns(tiers))


def _checked(row: LadderRow) -> dict[str, Any]:
    missing = [name for name in RESULT_FIELDS if name not in row.evaluation]
    if missing:
        raise ValueError(f"the evaluation of {row.label!r} lacks {', '.join(missing)}: run its evaluate stage again")
    return dict(row.evaluation)


def _columns(tiers: Sequence[str]) -> list[str]:
    scores = ["accuracy", "low", "high", *(TIER + tier for tier in tiers)]
    difference = ["difference", "difference_low", "difference_high", "p_value"]
    return [
        "branch",
        "scheme",
        *scores,
        *difference,
        "truncation",
        "mean_length",
        "problems",
        "seeds",
        "digest",
        "command",
    ]


def _numbers(row: LadderRow, tiers: Sequence[str]) -> dict[str, Any]:
    result, difference = _checked(row), row.difference or {}
    low, high = result["ci95"]
    difference_low, difference_high = difference.get("ci95", (math.nan, math.nan))
    of_tier = {str(tier): values["accuracy"] for tier, values in result["tiers"].items()}
    return {
        "branch": row.label,
        "scheme": row.scheme,
        "accuracy": 100 * result["accuracy"],
        "low": 100 * low,
        "high": 100 * high,
        **{TIER + tier: 100 * of_tier.get(tier, math.nan) for tier in tiers},
        "difference": 100 * difference.get("diff", math.nan),
        "difference_low": 100 * difference_low,
        "difference_high": 100 * difference_high,
        "p_value": difference.get("p_value", math.nan),
        "truncation": 100 * result["truncation_rate"],
        "mean_length": result["mean_length"],
        "problems": result["num_problems"],
        "seeds": len(result["seeds"]),
        "digest": row.digest,
        "command": row.command,
    }


def natural_key(text: str) -> list[tuple[int, int, str]]:
    """Sort key by which "tier 2" comes before "tier 10"."""
    parts = re.findall(r"\d+|\D+", text)
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]


def is_noise(row: pd.Series) -> bool:
    """Whether the 95% interval of a ladder row's difference includes 0."""
    return bool(row["difference_low"] <= 0 <= row["difference_high"])


def ladder_text(table: pd.DataFrame, reference: str | None = None) -> pd.DataFrame:
    """`ladder_table` for people. Columns that would be empty (no tiers, no reference) are left out."""
    text = pd.DataFrame({"branch": table["branch"], "scheme": table["scheme"]})
    text["accuracy % [95%]"] = [_interval(*values) for values in table[["accuracy", "low", "high"]].to_numpy()]
    for column in table.columns:
        if column.startswith(TIER):
            text[column] = [_number(value) for value in table[column]]
    if table["difference"].notna().any():
        columns = table[["difference", "difference_low", "difference_high"]]
        heading = f"points vs {reference}" if reference else "points vs reference"
        text[heading] = [_interval(*values, sign="+") for values in columns.to_numpy()]
    text["truncated %"] = [_number(value) for value in table["truncation"]]
    text["mean length"] = [_number(value) for value in table["mean_length"]]
    text["problems x seeds"] = [f"{p} x {s}" for p, s in zip(table["problems"], table["seeds"], strict=True)]
    text["checkpoint"] = [digest[:SHORT_DIGEST] for digest in table["digest"]]
    return text


def _number(value: float, sign: str = "") -> str:
    return ABSENT if math.isnan(value) else f"{value:{sign}.1f}"


def _interval(value: float, low: float, high: float, *, sign: str = "") -> str:
    if math.isnan(value):
        return ABSENT
    return f"{_number(value, sign)} [{_number(low, sign)}, {_number(high, sign)}]"


def is_numeric(column: Sequence[str]) -> bool:
    """Whether a column of text holds figures, which are set flush right."""
    return all(FIGURES.fullmatch(cell) for cell in column)


def markdown(table: pd.DataFrame) -> str:
    """A table of text as GitHub-flavoured Markdown; what would end a cell or be markup is escaped."""
    ruler = ["---:" if is_numeric(table[name]) else ":---" for name in table.columns]
    lines = [[_markdown_cell(name) for name in table.columns], ruler]
    lines += [[_markdown_cell(cell) for cell in row] for row in table.to_numpy()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _markdown_cell(text: str) -> str:
    one_line = " ".join(str(text).split())
    return re.sub(r"([\\|`*_\[\]])", r"\\\1", html.escape(one_line, quote=False))


def rich_table(table: pd.DataFrame, title: str | None = None) -> Table:
    """A table of text for the terminal; nothing in it is read as rich markup."""
    shown = Table(title=None if title is None else Text(title), title_justify="left")
    for name in table.columns:
        shown.add_column(Text(name), justify="right" if is_numeric(table[name]) else "left")
    for row in table.to_numpy():
        shown.add_row(*(Text(str(cell)) for cell in row))
    return shown
