"""One evaluation's results.json as tables of text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from tasks.reporting.tables import ABSENT, natural_key

SCORERS = ("strict", "paper")


def scorer_text(results: Mapping[str, Any]) -> pd.DataFrame:
    """One row per scorer: accuracy with interval, each seed, standard deviation over the seeds, answers found."""
    rows = []
    for scorer in SCORERS:
        figures = _figures(results, scorer)
        std = figures["std"]
        rows.append(
            {
                "scorer": scorer,
                "accuracy % [95%]": _percent(figures),
                **{
                    f"seed {seed}": f"{100 * accuracy:.1f}"
                    for seed, accuracy in zip(results["seeds"], figures["per_seed"], strict=True)
                },
                "std": ABSENT if std is None else f"{100 * std:.1f}",
                "answer found %": f"{100 * figures['answer_found_rate']:.1f}",
            }
        )
    return pd.DataFrame(rows)


def tier_text(results: Mapping[str, Any]) -> pd.DataFrame:
    """One row per tier, one column per scorer; empty where the problems have no tiers."""
    tiers = sorted(results["tiers"], key=natural_key)
    columns: dict[str, list[str]] = {"tier": tiers}
    for scorer in SCORERS:
        columns[f"{scorer} % [95%]"] = [_percent(_figures(results, scorer)["tiers"][tier]) for tier in tiers]
    columns["problems"] = [str(results["tiers"][tier]["num"]) for tier in tiers]
    return pd.DataFrame(columns)


def response_text(results: Mapping[str, Any]) -> dict[str, str]:
    """What the responses were like, whatever their answers."""
    entropy = results["entropy"]
    unsafe = {"programs ran": "without a sandbox (unsafe_code)"} if results.get("unsafe_code") else {}
    return unsafe | {
        "mean length": f"{results['mean_length']:.1f} tokens",
        "median length": f"{results['median_length']:.1f} tokens",
        "truncated": f"{100 * results['truncation_rate']:.1f} %",
        "ending in a loop": f"{100 * results['repetition_rate']:.1f} %",
        "entropy": "not known" if entropy is None else f"{entropy:.4f} nats per token",
        "comparisons that timed out": str(results["grader_timeouts"]),
        "scorers disagree on": f"{results['disagreements']['num']} samples",
    }


def _figures(results: Mapping[str, Any], scorer: str) -> Mapping[str, Any]:
    """The strict scorer's figures stand at the top of results.json."""
    return results if scorer == "strict" else results[scorer]


def _percent(figures: Mapping[str, Any]) -> str:
    low, high = figures["ci95"]
    return f"{100 * figures['accuracy']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
