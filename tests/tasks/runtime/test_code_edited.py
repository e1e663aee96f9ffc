"""Files edited while a run goes on, in a copy of the sources: what other code made is not committed under a key."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from artifacts.keys import REPOSITORY

# The flow has taken the digest; then the file is edited, a worker imports it and runs, and the file is edited back.
SCRIPT = """
import sys
from pathlib import Path
from artifacts.store import Store
from tasks.dataset import DatasetConfig, dataset
from tasks.runtime.execute import StageRun, find_cached
from tasks.runtime.executor import StageExecutor
from tasks.runtime.stage import StageError

def main(old, new, when):
    store, file = Store("store"), Path("tasks/data/making.py")
    text = file.read_text()
    assert old in text
    executor = StageExecutor(1, 1)
    def make(seed):
        config = DatasetConfig(source="bundled", split="test", num_examples=3, seed=seed)
        return StageRun(dataset, config, {}, store.root, source_digest=dataset.source_digest(config))
    run = make(1)
    if when == "worker is there":
        executor.run(make(2), lambda progress: None)
    file.write_text(text.replace(old, new))
    try:
        executor.run(run, lambda progress: None)
        print("committed")
    except StageError as error:
        print(error)
    finally:
        file.write_text(text)
        executor.close()
    print("hit" if find_cached(make(1)) else "miss", len(list(store.records())))

if __name__ == "__main__":
    main(*sys.argv[1:])
"""
EDIT = ('"seed": config.seed,', '"seed": config.seed, "edited": True,')
WORDS = ("    description = {", "    # words\n    description = {")


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("clone")
    for room in ("artifacts", "tasks", "quant"):
        shutil.copytree(
            REPOSITORY / room, root / room, ignore=shutil.ignore_patterns("store", "bundled", "__pycache__")
        )
    (root / "script.py").write_text(SCRIPT)
    return root


@pytest.mark.parametrize(
    "edit, when, shown",
    [
        (EDIT, "before the worker", "tasks/data/making.py: function"),
        (WORDS, "before the worker", "committed"),
        (EDIT, "worker is there", "committed"),
    ],
    ids=["other code", "words", "after the import"],
)
def test_an_edit_during_a_run(clone: Path, edit: tuple[str, str], when: str, shown: str) -> None:
    shutil.rmtree(clone / "store", ignore_errors=True)
    environment = {**os.environ, "PYTHONPATH": str(clone), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "script.py", *edit, when]
    done = subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True, timeout=300)
    first, second = done.stdout.strip().splitlines()
    assert shown in first, done.stderr
    if shown == "committed":
        assert second.startswith("hit")
    else:
        assert "run the same command again" in first and len(first) <= 300
        assert second == "miss 0"
