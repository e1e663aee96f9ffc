"""Worker processes for stages: the flow process stays light, and a stage can be killed without harming the others."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from artifacts.store import Store
from tasks.runtime.execute import LOG_FILE, PROGRESS_FILE, Outcome, StageRun, execute
from tasks.runtime.processes import follow_parent
from tasks.runtime.stage import StageError

POLL_SECONDS = 0.5


class StageExecutor:
    """At most `jobs` stages at a time, each in a worker process with an equal share of the cores.

    Workers are reused, because importing torch and transformers costs seconds; a stage that asks for a fresh process
    (vLLM, or a GPU whose memory must be free again) gets one of its own.
    """

    def __init__(self, jobs: int, num_threads: int) -> None:
        self._slots = threading.BoundedSemaphore(jobs)
        self._num_threads = num_threads
        self._shared = self._pool(jobs)

    def _pool(self, workers: int) -> ProcessPoolExecutor:
        spawn = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(workers, spawn, initializer=_start_worker, initargs=(self._num_threads,))

    def run(self, run: StageRun, on_progress: Callable[[dict[str, Any]], None], *, fresh: bool = False) -> Outcome:
        """Run one stage in a worker and wait; `on_progress` gets its progress about twice a second, and an
        empty one when it starts.

        Raises what the stage raised, or StageError when the worker died.
        """
        store = Store(run.store_root)
        scratch = store.scratch(store.key(run.payload()))
        with self._slots:
            on_progress({})
            pool = self._pool(1) if fresh else self._shared
            try:
                return _wait(pool.submit(execute, run), scratch / PROGRESS_FILE, on_progress)
            except BrokenProcessPool as error:
                raise StageError(
                    f"the worker process of stage {run.stage.name} died (out of memory, stuck, or killed); its log is "
                    f"{scratch / LOG_FILE}. Run the same command again: the stage resumes from its last checkpoint."
                ) from error
            finally:
                if fresh:
                    pool.shutdown()

    def close(self) -> None:
        self._shared.shutdown()

    def kill(self) -> None:
        """End the workers at once, for Ctrl-C; what they had checkpointed stays in scratch."""
        for process in multiprocessing.active_children():
            process.kill()
        self._shared.shutdown(wait=False, cancel_futures=True)


def _wait(future: Future[Outcome], progress_file: Path, on_progress: Callable[[dict[str, Any]], None]) -> Outcome:
    seen = ""
    while True:
        try:
            return future.result(timeout=POLL_SECONDS)
        except FutureTimeout:
            if future.done():
                return future.result()
        try:
            text = progress_file.read_text()
        except FileNotFoundError:
            text = ""
        if text and text != seen:
            seen = text
            on_progress(json.loads(text))


def _start_worker(num_threads: int) -> None:
    """Live and die with the parent, and keep to this worker's share of the cores."""
    follow_parent()
    os.environ["OMP_NUM_THREADS"] = str(num_threads)
    import torch

    torch.set_num_threads(num_threads)
