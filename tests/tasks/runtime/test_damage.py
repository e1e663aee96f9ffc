"""A run over a store of which one file, of whatever kind, is damaged: it ends with the artifacts of an undisturbed one.

Three stages, the last of which was killed in a first attempt: so there are artifacts, measurements, records, a ledger,
a lock, mid-stage state, progress and a log.
"""

from __future__ import annotations

import importlib
import multiprocessing
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from artifacts import Ref, Store, StoreError
from tasks.runtime.execute import Outcome, StageRun, execute, find_cached
from tasks.runtime.stage import StageError

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
toys = importlib.import_module("tests.tasks.runtime.toy_stages")

Damage = Callable[[Path], None]


def runs(root: Path) -> tuple[StageRun, StageRun, StageRun]:
    """A stage, and two that come after it."""
    source = StageRun(toys.source, toys.SourceConfig(text="hello"), {}, root)
    upper = StageRun(toys.upper, toys.UpperConfig(), {}, root)
    return source, upper, StageRun(toys.upper, toys.UpperConfig(num_steps=4), {}, root)


def run(stage_run: StageRun, **inputs: Ref) -> Outcome:
    """As the flow does it: a look-up, else the stage."""
    stage_run = replace(stage_run, inputs=inputs)
    return find_cached(stage_run) or execute(stage_run)


def all_runs(root: Path) -> list[Outcome]:
    source, upper, last = runs(root)
    text = run(source).ref
    return [run(source), run(upper, text=text), run(last, text=text)]


@pytest.fixture(scope="module")
def used(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with two finished stages and a third that was killed."""
    root = tmp_path_factory.mktemp("used") / "store"
    source, upper, last = runs(root)
    text = run(source).ref
    run(upper, text=text)
    killed = replace(last, config=toys.UpperConfig(num_steps=4, stop_at=2))
    child = multiprocessing.get_context("fork").Process(target=run, args=(killed,), kwargs={"text": text})
    child.start()
    child.join()
    assert child.exitcode == -9
    return root


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("undisturbed") / "store"
    return contents(root, all_runs(root))


def contents(root: Path, outcomes: list[Outcome]) -> dict[str, str]:
    store = Store(root)
    return {str(outcome.ref): (store.path(outcome.ref) / "text.txt").read_text() for outcome in outcomes}


# Every kind of file in the store, the place where its only instance stands, or one of them.
KINDS = {
    "input artifact": "objects/text/*/text.txt",
    "manifests": "objects/text/*/MANIFEST.json",
    "measurements": "objects/telemetry/*/measured.txt",
    "records": "records/*.json",
    "ledger": "ledger.jsonl",
    "lock": "locks/*.lock",
    "mid-stage state": "work/*/steps/text.txt",
    "its manifest": "work/*/steps/MANIFEST.json",
    "progress": "work/*/progress-*.json",
    "log": "work/*/stage.log",
}


@pytest.mark.parametrize("kind", KINDS)
def test_no_damaged_file_is_used(
    used: Path, undisturbed: dict[str, str], tmp_path: Path, damage: Damage, kind: str
) -> None:
    root = tmp_path / "store"
    shutil.copytree(used, root)
    files = [file for file in sorted(root.glob(KINDS[kind])) if file.stat().st_size]
    assert files or kind in ("lock", "log")
    for file in files:
        damage(file)
    try:
        outcomes = all_runs(root)
    except (StoreError, StageError) as error:  # a folder where the ledger or a lock is needed
        assert kind in ("ledger", "lock", "log", "progress") and len(str(error)) <= 300
        return
    assert contents(root, outcomes) == undisturbed
    assert all(outcome.cached for outcome in all_runs(root)), "a run after it is all hits"


@pytest.mark.parametrize("when", ["a file is added", "the folder is gone"])
def test_folders_that_changed(used: Path, undisturbed: dict[str, str], tmp_path: Path, when: str) -> None:
    root = tmp_path / "store"
    shutil.copytree(used, root)
    for folder in root.glob("objects/text/*"):
        shutil.rmtree(folder) if when.startswith("the folder") else (folder / "adapter.json").write_text("{}")
    assert contents(root, all_runs(root)) == undisturbed


def test_an_input_that_was_damaged_after_it_was_found_is_not_read(used: Path, tmp_path: Path) -> None:
    """The stage does not begin; the next run makes the input again."""
    root = tmp_path / "store"
    shutil.copytree(used, root)
    source, upper, _ = runs(root)
    text = run(source).ref
    (Store(root).folder(text) / "text.txt").chmod(0o644)
    (Store(root).folder(text) / "text.txt").write_text("HELLO")
    forced = replace(upper, inputs={"text": text}, force=True)
    with pytest.raises(StoreError, match=r"damaged and was set aside: run its stage again"):
        execute(forced)
    assert not run(source).cached
    assert execute(forced).ref == run(upper, text=text).ref
