"""The problems of an evaluation: read from a dataset artifact, checked and chosen."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.judging.questions import Problem
from tasks.runtime.stage import StageError

DATASET_FILE = "data.parquet"
COLUMNS = ["id", "prompt", "answer", "tier", "details"]


def load_problems(data: Path, num_problems: int | None) -> list[Problem]:
    """Problems of a dataset artifact in its order; with `num_problems`, a fixed pseudo-random choice of that many.

    The choice goes by a hash of the id, so it is the same for every checkpoint, does not favour the tiers that happen
    to come first, and a larger choice contains every smaller one.

    Raises:
        StageError: no data, a problem without prompt or answer, ids that are not unique, more problems asked for than
            there are.
    """
    path = data / DATASET_FILE
    if not path.exists():
        raise StageError(f"{data} holds no {DATASET_FILE}: give the evaluation a dataset artifact")
    try:
        table = pq.read_table(path, columns=COLUMNS)
    except (KeyError, pa.ArrowInvalid) as error:
        raise StageError(f"{path} is not a dataset with the columns {', '.join(COLUMNS)}: {error}") from error
    problems = [Problem(**row) for row in table.to_pylist()]
    _check(problems, path)
    if num_problems is None:
        return problems
    if num_problems > len(problems):
        raise StageError(f"num_problems is {num_problems}, but {path} holds {len(problems)}: lower num_problems")
    chosen = set(sorted(_hash(problem.id) for problem in problems)[:num_problems])
    return [problem for problem in problems if _hash(problem.id) in chosen]


def _check(problems: list[Problem], path: Path) -> None:
    if not problems:
        raise StageError(f"{path} is empty: nothing to evaluate. Choose another data set or split")
    for problem in problems:
        if not problem.prompt or not problem.answer:
            raise StageError(
                f"{path}: problem {problem.id!r} has no {'prompt' if not problem.prompt else 'answer'}; an evaluation "
                "needs problems with a prompt and a gold answer (a plain text corpus cannot be evaluated)"
            )
    ids = pd.Series([problem.id for problem in problems])
    if ids.duplicated().any():
        raise StageError(f"{path}: id {ids[ids.duplicated()].iloc[0]!r} occurs twice; problem ids must be unique")


def _hash(problem_id: str) -> str:
    return hashlib.sha256(problem_id.encode()).hexdigest()
