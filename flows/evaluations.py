"""Evaluations of the store for people: one shown, two compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.text import Text

from artifacts.records import Record, differences
from artifacts.refs import Ref
from artifacts.store import Store, StoreError
from tasks.evaluation.statistics import paired_bootstrap
from tasks.reporting import evaluation, regressions, tables
from tasks.runtime.machine import version_differences

KIND = "evaluation"
MOST_DISAGREEMENTS = 8  # named on the terminal; results.json names more
VERDICTS = {"strict": "correct", "paper": "correct_paper"}
SAMPLE_COLUMNS = (
    "problem_id", "seed", "tier", "gold", "extracted", "correct", "correct_paper", "finish_reason", "num_output_tokens",
    "output_text", "details",
)  # fmt: skip


def show_evaluation(folder: Path, console: Console) -> None:
    """Print the figures of an evaluation artifact."""
    results = json.loads((folder / "results.json").read_text())
    title = f"{results['task']}: {results['num_problems']} problems x {len(results['seeds'])} seeds"
    console.print(tables.rich_table(evaluation.scorer_text(results), title))
    if results["tiers"]:
        console.print(tables.rich_table(evaluation.tier_text(results)))
    facts = evaluation.response_text(results)
    named = results["disagreements"]["first"][:MOST_DISAGREEMENTS]
    if named:
        facts["they are"] = ", ".join(f"{row['problem_id']} (seed {row['seed']})" for row in named)
    _print_facts(facts | {"intervals": results["ci_method"]}, console)


def show_telemetry(store: Store, ref: Ref, console: Console) -> None:
    """Print what was measured while an artifact was made."""
    if found := store.verify(ref, full=True):
        console.print(Text(f"telemetry {'; '.join(found)}"))
        return
    folder = store.folder(ref)
    facts: dict[str, Any] = {"measured in": folder}
    if (folder / "timings.parquet").exists():
        timings = pd.read_parquet(folder / "timings.parquet")
        middle, longest = timings["seconds"].median(), timings["seconds"].max()
        facts["seconds per sample"] = f"median {middle:.1f}, longest {longest:.1f}; {timings['resumed'].sum()} resumed"
    if (folder / "hardware.json").exists():
        facts |= json.loads((folder / "hardware.json").read_text())
    _print_facts(facts, console)


def _print_facts(facts: dict[str, Any], console: Console) -> None:
    for name, value in facts.items():
        console.print(Text(f"{name}: {value}"), soft_wrap=True)


def compare_evaluations(store: Store, before: str, after: str, page: Path, most: int, console: Console) -> Path:
    """Print the paired differences between two evaluations and write the page of the worst regressions.

    Raises:
        StoreError: a digest that is unknown or no evaluation, or evaluations of different problems or seeds.
    """
    old, new = _evaluation_record(store, before), _evaluation_record(store, after)
    old_samples, new_samples = _samples(store, old), _samples(store, new)
    _check_comparable(old_samples, new_samples)
    names = old.ref.short, new.ref.short
    figures = _figures(old_samples, new_samples, names)
    differing = [found for found in differences(old.payload, new.payload) if found != "input checkpoint changed"]
    differing += version_differences(old, new.provenance.get("versions", {}))
    changes = regressions.find_changes(old_samples, new_samples, most)
    console.print(tables.rich_table(figures, f"{names[1]} against {names[0]}; ~ is within noise"))
    for difference in differing:
        console.print(Text(f"they also differ: {difference}"))
    console.print(f"{changes.num_worse} problems got worse, {changes.num_better} better, {changes.num_same} stayed")
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(regressions.build_page(names, figures, differing, changes, _prompts(store, old)), "utf-8")
    return page


def _evaluation_record(store: Store, digest: str) -> Record:
    """The newest record of an evaluation; for a checkpoint the error names its evaluations."""
    ref = store.resolve(digest)
    records = list(store.records())
    if ref.kind == KIND:
        return [record for record in records if record.ref == ref][-1]
    of_it = [r.ref.short for r in records if r.ref.kind == KIND and str(ref) in r.payload["inputs"].values()]
    hint = (
        f"its evaluations are {', '.join(dict.fromkeys(of_it))}" if of_it else "see `reasoning-qat ls --stage evaluate`"
    )
    raise StoreError(f"{ref.kind} {ref.short} is no evaluation: {hint}")


def _samples(store: Store, record: Record) -> pd.DataFrame:
    return pd.read_parquet(store.path(record.ref) / "samples.parquet", columns=list(SAMPLE_COLUMNS))


def _check_comparable(before: pd.DataFrame, after: pd.DataFrame) -> None:
    keys = [set(zip(samples["problem_id"], samples["seed"], strict=True)) for samples in (before, after)]
    if unpaired := keys[0] ^ keys[1]:
        problem_id, seed = min(unpaired)
        raise StoreError(
            f"{len(unpaired)} samples are in only one of the two (for example {problem_id!r}, seed {seed}): compare "
            "evaluations of the same data with the same num_problems and seeds"
        )


def _figures(before: pd.DataFrame, after: pd.DataFrame, names: tuple[str, str]) -> pd.DataFrame:
    """One row per scorer: both accuracies and the paired difference, in percent and points."""
    rows = []
    for scorer, verdict in VERDICTS.items():
        paired = paired_bootstrap(before, after, verdict)
        points = [100 * value for value in (paired["diff"], *paired["ci95"])]
        rows.append(
            {
                "scorer": scorer,
                f"{names[0]} %": f"{100 * before[verdict].mean():.1f}",
                f"{names[1]} %": f"{100 * after[verdict].mean():.1f}",
                "points [95%]": tables.difference_text(*points),
                "p": f"{paired['p_value']:.2g}",
                "problems": str(paired["num_problems"]),
            }
        )
    return pd.DataFrame(rows)


def _prompts(store: Store, record: Record) -> dict[str, str]:
    """Problem texts by id, from the data set that was evaluated; empty where that is gone."""
    data = Ref.parse(record.payload["inputs"]["data"])
    if store.verify(data, full=True):
        return {}
    problems = pd.read_parquet(store.folder(data) / "data.parquet", columns=["id", "prompt"])
    return dict(zip(problems["id"], problems["prompt"], strict=True))
