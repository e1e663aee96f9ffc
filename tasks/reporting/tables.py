"""Tables: numbers in a DataFrame first, text for people second, so that the numbers can be read back.

`ladder_table` holds percentages and percentage points as floats; `ladder_text` is the text form of one benchmark's rows
and `overview_text` that of several benchmarks side by side. `markdown` and `rich_table` print any table of text.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Sequence
from typing import Any

import pandas as pd
from rich.console import JustifyMethod
from rich.table import Table
from rich.text import Text

from tasks.reporting.data import SHORT_DIGEST, LadderRow

TIER = "tier "  # prefix of the per-tier columns
CHECKPOINT = "checkpoint"
ABSENT = "–"  # noqa: RUF001 - an en dash, as in printed tables
NOISE = " ~"  # ends the text of a difference whose 95% interval includes 0, and makes it pale
FIGURES = re.compile(r"([-+]?\d+(\.\d+)?( \[.*\]| x \d+)?|" + ABSENT + ")( ~)?")
RESULT_FIELDS = (
    "task",
    "accuracy",
    "ci95",
    "tiers",
    "paper",
    "truncation_rate",
    "repetition_rate",
    "mean_length",
    "entropy",
    "num_problems",
    "seeds",
)


def ladder_table(rows: Sequence[LadderRow]) -> pd.DataFrame:
    """One row per branch and benchmark: percentages, points against the reference, tokens. The unknown is NaN.

    Columns: branch, scheme, benchmark, accuracy, low, high (95% interval), "tier <name>" ..., difference,
    difference_low, difference_high, p_value, accuracy_paper (by the paper-compatible scorer), truncation, repetition,
    mean_length, entropy (nats per token), problems, seeds, digest, command.
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
        "benchmark",
        *scores,
        *difference,
        "accuracy_paper",
        "truncation",
        "repetition",
        "mean_length",
        "entropy",
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
        "benchmark": result["task"],
        "accuracy": 100 * result["accuracy"],
        "low": 100 * low,
        "high": 100 * high,
        **{TIER + tier: 100 * of_tier.get(tier, math.nan) for tier in tiers},
        "difference": 100 * difference.get("diff", math.nan),
        "difference_low": 100 * difference_low,
        "difference_high": 100 * difference_high,
        "p_value": difference.get("p_value", math.nan),
        "accuracy_paper": 100 * result["paper"]["accuracy"],
        "truncation": 100 * result["truncation_rate"],
        "repetition": 100 * result["repetition_rate"],
        "mean_length": result["mean_length"],
        "entropy": math.nan if result["entropy"] is None else result["entropy"],
        "problems": result["num_problems"],
        "seeds": len(result["seeds"]),
        "digest": row.digest,
        "command": row.command,
    }


def natural_key(text: str) -> list[tuple[int, int, str]]:
    """Sort key by which "tier 2" comes before "tier 10"."""
    parts = re.findall(r"\d+|\D+", text)
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]


def by_benchmark(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The rows of each benchmark, in the order in which benchmarks occur first; tiers of other benchmarks left out."""
    of_benchmark = {str(name): rows for name, rows in table.groupby("benchmark", sort=False)}
    return {
        name: rows.drop(columns=[c for c in rows.columns if c.startswith(TIER) and rows[c].isna().all()])
        for name, rows in of_benchmark.items()
    }


def overview_text(table: pd.DataFrame) -> pd.DataFrame:
    """One row per branch, one column per benchmark, and their plain mean where a branch has all of them.

    An accuracy whose difference from the reference is noise ends with the mark of it.
    """
    first_rows = table.drop_duplicates("branch")
    accuracy = table.pivot(index="branch", columns="benchmark", values="accuracy")
    cells = {
        (row.branch, row.benchmark): _interval(row.accuracy, row.low, row.high)
        + _mark(row.difference_low, row.difference_high)
        for row in table.itertuples()
    }
    text = pd.DataFrame({"branch": first_rows["branch"], "scheme": first_rows["scheme"]})
    for name in table["benchmark"].unique():
        text[f"{name} % [95%]"] = [cells.get((branch, name), ABSENT) for branch in text["branch"]]
    text["mean %"] = [_number(accuracy.loc[branch].mean(skipna=False)) for branch in text["branch"]]
    return text.reset_index(drop=True)


def _mark(low: float, high: float) -> str:
    return NOISE if low <= 0 <= high else ""


def ladder_text(table: pd.DataFrame, reference: str | None = None) -> pd.DataFrame:
    """The rows of one benchmark for people. Columns that would be empty (no tiers, no reference) are left out."""
    text = pd.DataFrame({"branch": table["branch"], "scheme": table["scheme"]})
    text["accuracy % [95%]"] = [_interval(*values) for values in table[["accuracy", "low", "high"]].to_numpy()]
    for column in table.columns:
        if column.startswith(TIER):
            text[column] = [_number(value) for value in table[column]]
    if table["difference"].notna().any():
        columns = table[["difference", "difference_low", "difference_high"]]
        heading = f"points vs {reference}" if reference else "points vs reference"
        text[heading] = [difference_text(*values) for values in columns.to_numpy()]
    text["paper scorer %"] = [_number(value) for value in table["accuracy_paper"]]
    text["truncated %"] = [_number(value) for value in table["truncation"]]
    text["repeating %"] = [_number(value) for value in table["repetition"]]
    text["mean length"] = [_number(value) for value in table["mean_length"]]
    text["entropy"] = [ABSENT if math.isnan(value) else f"{value:.3f}" for value in table["entropy"]]
    text["problems x seeds"] = [f"{p} x {s}" for p, s in zip(table["problems"], table["seeds"], strict=True)]
    text[CHECKPOINT] = [digest[:SHORT_DIGEST] for digest in table["digest"]]
    return text


def _number(value: float, sign: str = "") -> str:
    return ABSENT if math.isnan(value) else f"{value:{sign}.1f}"


def _interval(value: float, low: float, high: float, *, sign: str = "") -> str:
    if math.isnan(value):
        return ABSENT
    return f"{_number(value, sign)} [{_number(low, sign)}, {_number(high, sign)}]"


def difference_text(difference: float, low: float, high: float) -> str:
    """A difference in points with its interval; marked where that includes 0."""
    return _interval(difference, low, high, sign="+") + _mark(low, high)


def is_noise(cell: object) -> bool:
    """Whether a cell of a table of text is a difference that may be chance."""
    return str(cell).endswith(NOISE)


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
    """A table of text for the terminal, noise in pale; nothing in it is read as rich markup."""
    shown = Table(title=None if title is None else Text(title), title_justify="left")
    for name in table.columns:
        justify: JustifyMethod = "right" if is_numeric(table[name]) else "left"
        # On a narrow terminal words go on in the next line; a digest stays whole, to be copied.
        shown.add_column(Text(name), justify=justify, overflow="fold", no_wrap=name == CHECKPOINT)
    for row in table.to_numpy():
        shown.add_row(*(Text(str(cell), style="dim" if is_noise(cell) else "") for cell in row))
    return shown
