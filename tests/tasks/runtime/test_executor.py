"""Worker processes: the death of one harms no other, and all end within seconds when they are asked to."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from artifacts.store import Store
from tasks.runtime.execute import StageRun, execute
from tasks.runtime.executor import STOP_SECONDS, StageExecutor
from tasks.runtime.stage import StageError

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
toys = importlib.import_module("tests.tasks.runtime.toy_stages")  # the name by which worker processes find it


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def executor() -> Iterator[StageExecutor]:
    two = StageExecutor(jobs=2, num_threads=1)
    yield two
    two.close()


class Background:
    """A stage of its own thread, as Prefect runs it; its text differs, so its key does."""

    def __init__(self, executor: StageExecutor, store: Store, text: str, **config: Any) -> None:
        source = execute(StageRun(toys.source, toys.SourceConfig(text=text), {}, store.root)).ref
        self.run = StageRun(toys.upper, toys.UpperConfig(**config), {"text": source}, store.root)
        self.steps = 0
        self.result: Any = None
        self.ended_at = 0.0
        self._executor = executor
        self._thread = threading.Thread(target=self._go)
        self._thread.start()

    def _go(self) -> None:
        try:
            self.result = self._executor.run(self.run, self._on_progress).metrics
        except StageError as error:
            self.result = error
        self.ended_at = time.monotonic()

    def _on_progress(self, progress: dict[str, Any]) -> None:
        self.steps = progress.get("done", 0)

    def until_step(self, step: int) -> None:
        deadline = time.monotonic() + 120
        while self.steps < step:
            assert time.monotonic() < deadline and self.result is None
            time.sleep(0.02)

    def end(self) -> Any:
        self._thread.join()
        return self.result


@pytest.mark.parametrize("dies_first", [True, False])
def test_the_death_of_a_worker_fails_its_stage_and_no_other(
    executor: StageExecutor, store: Store, dies_first: bool
) -> None:
    """Both workers are used before, so that both stages run in workers that are shared."""
    for warm in [Background(executor, store, f"warm {i}", num_steps=3, seconds=0.2) for i in range(2)]:
        assert warm.end() == {"resumed_from": 0}
    lives: dict[str, Any] = {"text": "lives", "num_steps": 20, "seconds": 0.2}
    dies: dict[str, Any] = {"text": "dies", "num_steps": 20, "seconds": 0.2, "stop_at": 4}
    first = Background(executor, store, **(dies if dies_first else lives))
    time.sleep(0.3)
    second = Background(executor, store, **(lives if dies_first else dies))
    dying, living = (first, second) if dies_first else (second, first)
    error = dying.end()
    assert isinstance(error, StageError) and "died" in str(error) and "Run the same command again" in str(error)
    assert living.end() == {"resumed_from": 0}
    assert dying.ended_at < living.ended_at - 1, "told at once, not when its sibling ends"
    later = [Background(executor, store, f"later {i}") for i in range(3)]
    assert [stage.end() for stage in later] == [{"resumed_from": 0}] * 3
    assert Background(executor, store, **dies).end() == {"resumed_from": 4}


def test_workers_are_reused_and_end_with_the_executor(store: Store) -> None:
    before = set(psutil.Process().children())
    executor = StageExecutor(jobs=2, num_threads=1)
    for i in range(3):
        Background(executor, store, f"text {i}").end()
    [worker] = {p for p in set(psutil.Process().children()) - before if "spawn_main" in " ".join(p.cmdline())}
    executor.close()
    assert not worker.is_running()
    with pytest.raises(StageError, match="not started"):
        executor.run(Background(executor, store, "none").run, lambda progress: None)


@pytest.mark.parametrize("on_stop", ["dies", "saves", "ignores"])
def test_stopping_ends_a_stage_and_all_it_started_within_seconds(store: Store, tmp_path: Path, on_stop: str) -> None:
    executor = StageExecutor(jobs=1, num_threads=1)
    config = {"num_steps": 3000, "seconds": 0.1, "on_stop": on_stop, "starts": str(tmp_path / "child")}
    running = Background(executor, store, "long", **config)
    waiting = Background(executor, store, "waits for the slot")
    running.until_step(5)
    child = psutil.Process(int((tmp_path / "child").read_text()))
    started = time.monotonic()
    executor.kill()
    assert isinstance(running.end(), StageError) and isinstance(waiting.end(), StageError)
    assert time.monotonic() - started < (STOP_SECONDS + 2 if on_stop == "ignores" else 3)
    _, alive = psutil.wait_procs([child], timeout=5)
    assert not alive
    saved = store.scratch(store.key(running.run.payload())) / "saved"
    assert saved.exists() == (on_stop == "saves")


def test_a_worker_and_what_it_started_end_with_a_killed_parent(store: Store, tmp_path: Path) -> None:
    parent = os.fork()
    if parent == 0:
        executor = StageExecutor(jobs=1, num_threads=1)
        Background(executor, store, "long", num_steps=3000, seconds=0.1, starts=str(tmp_path / "child")).end()
        os._exit(0)
    deadline = time.monotonic() + 120
    while not (tmp_path / "child").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    family = psutil.Process(parent).children(recursive=True)
    assert int((tmp_path / "child").read_text()) in [process.pid for process in family]
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive
