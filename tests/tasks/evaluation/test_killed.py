"""kill -9 of a real evaluation (bundled model, lighteval, the real grader) at three points; then the same again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from tasks.data.bundled_problems import bundled_problems
from tasks.evaluate import EvaluateConfig, evaluate
from tasks.runtime.stage import Context
from tasks.sampling.config import GenerationConfig

REPOSITORY = Path(__file__).parents[3]
BUNDLED_MODEL = REPOSITORY / "artifacts" / "bundled" / "model"
NUM_PROBLEMS, SEEDS = 6, (42, 43)
# float32: there a sample does not depend on its batch, so a resumed run must give the very same bytes.
GENERATION = GenerationConfig(dtype="float32", max_new_tokens=160, batch_size=4)
CONFIG = EvaluateConfig(name="bundled", seeds=SEEDS, generation=GENERATION)

PROGRAM = """
import os, signal, sys
from pathlib import Path
from tasks.evaluate import EvaluateConfig, evaluate
from tasks.evaluation import records
from tasks.runtime.stage import Context

if __name__ == "__main__":
    folder, checkpoint, point = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]

    def kill(*arguments):
        os.kill(os.getpid(), signal.SIGKILL)

    def sink(progress):
        if str(progress["done"]) == point:
            kill()

    if point == "commit":
        records.write_telemetry = kill
    config = EvaluateConfig.model_validate_json(sys.argv[4])
    evaluate(config, Context(folder / "output", folder, sink=sink), checkpoint=checkpoint, data=folder)
"""

POINTS = {
    "while the first seed generates": ("2", 2),
    "between the seeds": (str(NUM_PROBLEMS), NUM_PROBLEMS),
    "after generating and grading, before the commit": ("commit", NUM_PROBLEMS * len(SEEDS)),
}


def prepare(folder: Path) -> Path:
    (folder / "output").mkdir(parents=True)
    problems = pd.DataFrame(bundled_problems("test", NUM_PROBLEMS, seed=5))
    problems.assign(details="").to_parquet(folder / "data.parquet")
    return folder


def run(folder: Path) -> dict[str, bytes]:
    evaluate(CONFIG, Context(folder / "output", folder), checkpoint=BUNDLED_MODEL, data=folder)
    return {path.name: path.read_bytes() for path in (folder / "output").iterdir()}


def kill(folder: Path, point: str) -> None:
    program = folder / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, str(program), str(folder), str(BUNDLED_MODEL), point, CONFIG.model_dump_json()]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return run(prepare(tmp_path_factory.mktemp("undisturbed")))


@pytest.mark.slow
@pytest.mark.parametrize(("point", "num_finished"), POINTS.values(), ids=POINTS)
def test_nothing_finished_is_lost_or_generated_twice(
    tmp_path: Path, undisturbed: dict[str, bytes], point: str, num_finished: int
) -> None:
    folder = prepare(tmp_path / "killed")
    kill(folder, point)
    journal = folder / "generations.jsonl"
    finished = journal.read_bytes()
    assert finished.count(b"\n") == num_finished
    output = run(folder)
    assert journal.read_bytes().startswith(finished), "finished records stay byte for byte"
    lines = [json.loads(line) for line in journal.read_bytes().splitlines()]
    assert len(lines) == len({line["key"] for line in lines}) == NUM_PROBLEMS * len(SEEDS)
    samples = pd.read_parquet(folder / "output" / "samples.parquet")
    assert not samples.duplicated(["problem_id", "seed"]).any() and len(samples) == NUM_PROBLEMS * len(SEEDS)
    timings = pd.read_parquet(folder / "telemetry" / "timings.parquet")
    assert timings["resumed"].sum() == num_finished
    assert output == undisturbed
