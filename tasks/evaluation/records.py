"""The evaluation artifact: samples.parquet, one row per (problem, seed), and results.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.evaluation.benchmarks import SampledResponse, specifics
from tasks.evaluation.lighteval_compat import Doc

SAMPLES_FILE, RESULTS_FILE = "samples.parquet", "results.json"
SCHEMA = pa.schema(
    [
        ("problem_id", pa.string()),
        ("seed", pa.int64()),
        ("tier", pa.string()),
        ("gold", pa.string()),
        ("extracted", pa.string()),
        ("correct", pa.bool_()),
        ("timed_out", pa.bool_()),
        ("finish_reason", pa.string()),
        ("num_prompt_tokens", pa.int32()),
        ("num_output_tokens", pa.int32()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("output_ids", pa.list_(pa.int32())),
        ("output_text", pa.string()),
    ]
)


def sample_row(doc: Doc, response: SampledResponse, seed: int) -> dict[str, Any]:
    """One scored sample as a row of samples.parquet."""
    assert response.verdict is not None, "lighteval scores every response"
    return {
        "problem_id": specifics(doc)["id"],
        "seed": seed,
        "tier": specifics(doc)["tier"],
        "gold": doc.get_golds()[0],
        "extracted": response.verdict.extracted,
        "correct": response.verdict.correct,
        "timed_out": response.verdict.timed_out,
        "finish_reason": response.finish_reason,
        "num_prompt_tokens": len(response.input_tokens),
        "num_output_tokens": len(response.output_tokens[0]),
        "prompt_ids": response.input_tokens,
        "output_ids": response.output_tokens[0],
        "output_text": response.text[0],
    }


def samples_table(rows: Sequence[dict[str, Any]], problem_ids: Sequence[str], seeds: Sequence[int]) -> pa.Table:
    """Rows by seed and then problem, in the given orders (lighteval shuffles its documents).

    Raises:
        RuntimeError: not every (problem, seed) is there exactly once.
    """
    by_key = {(row["seed"], row["problem_id"]): row for row in rows}
    expected = [(seed, problem_id) for seed in seeds for problem_id in problem_ids]
    if len(rows) != len(expected) or by_key.keys() != set(expected):
        raise RuntimeError(f"expected {len(expected)} samples, one per problem and seed, and got {len(rows)}")
    return pa.Table.from_pylist([by_key[key] for key in expected], SCHEMA)


def write_artifact(folder: Path, samples: pa.Table, results: dict[str, Any]) -> None:
    """Deterministic bytes: no times, paths or host names."""
    pq.write_table(samples, folder / SAMPLES_FILE, compression="zstd")
    text = json.dumps(results, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    (folder / RESULTS_FILE).write_text(text + "\n", encoding="utf-8")


def read_samples(folder: Path) -> pd.DataFrame:
    """The samples of an evaluation artifact."""
    return pd.read_parquet(folder / SAMPLES_FILE)
