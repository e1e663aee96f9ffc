"""Worker processes for stages: the flow process stays light, and a stage can be killed without harming the others."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures import TimeoutError as FutureTimeout
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from artifacts.store import Store
from tasks.runtime.execute import Outcome, StageRun, execute
from tasks.runtime.processes import end_group, follow_parent, lead_group
from tasks.runtime.progress import LOG_FILE, progress_file, read_progress
from tasks.runtime.stage import StageError

POLL_SECONDS = 0.5
STOP_SECONDS = 4.0
"""For a stage to save its state when the run is stopped; then it is killed."""

OnProgress = Callable[[dict[str, Any]], None]


class StageExecutor:
    """At most `jobs` stages at a time, each in a worker process with an equal share of the cores.

    Workers are reused, because importing torch and transformers costs seconds; a stage that asks for a fresh process
    (vLLM, or a GPU whose memory must be free again) gets one of its own.  The death of a worker fails the stage that it
    ran and no other.
    """

    def __init__(self, jobs: int, num_threads: int) -> None:
        # A killed worker leaves tqdm's semaphore to Python's tracker, which removes it, and need not tell the user.
        os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")
        self._slots = threading.BoundedSemaphore(jobs)
        self._num_threads = num_threads
        self._idle: list[_Worker] = []
        self._running: set[Future[Outcome]] = set()
        self._starting = threading.Lock()
        self.ended = False
        """Whether `close` or `kill` was called: what fails then says nothing of the stage."""

    def run(self, run: StageRun, on_progress: OnProgress, *, fresh: bool = False) -> Outcome:
        """Run one stage in a worker and wait; `on_progress` gets its progress about twice a second, and an
        empty one when it starts.

        Raises what the stage raised, or StageError when the worker died.
        """
        store = Store(run.store_root)
        scratch = store.scratch(store.key(run.payload()))
        report = progress_file(scratch)
        with self._slots:
            on_progress({})
            worker, future = self._start(run, report, fresh)
            keep = not fresh
            try:
                return _wait(future, report, on_progress)
            except BrokenProcessPool:
                keep = False
                happened = "was ended: the run is being stopped" if self.ended else "died (out of memory, or killed)"
                raise StageError(
                    f"the worker process of stage {run.stage.name} {happened}; its log is {scratch / LOG_FILE}. "
                    "Run the same command again: the stage resumes from its last checkpoint."
                ) from None
            finally:
                self._release(worker, keep)

    def _start(self, run: StageRun, report: Path, fresh: bool) -> tuple[_Worker, Future[Outcome]]:
        """An idle worker, or a new one, with the stage handed to it."""
        while True:
            with self._starting:
                if self.ended:
                    raise StageError(f"stage {run.stage.name} was not started: the run is being stopped")
                worker = _Worker(self._num_threads) if fresh or not self._idle else self._idle.pop()
                try:
                    future = worker.submit(run, report)
                except BrokenProcessPool:  # it died while it was idle
                    worker.end()
                    continue
                self._running.add(future)
                future.add_done_callback(self._running.discard)
                return worker, future

    def _release(self, worker: _Worker, keep: bool) -> None:
        with self._starting:
            if keep := keep and not self.ended:
                self._idle.append(worker)
        if not keep:
            worker.end()

    def close(self) -> None:
        """Start no further stage, and end the workers: one that runs a stage when it is done."""
        with self._starting:
            self.ended = True
            idle, self._idle = self._idle, []
        for worker in idle:
            worker.end()

    def kill(self) -> None:
        """End all workers within seconds; what they had checkpointed, or save now, stays in scratch."""
        with self._starting:
            self.ended = True
            running = list(self._running)
        workers = multiprocessing.active_children()
        for worker in workers:
            worker.terminate()
        wait(running, STOP_SECONDS)  # for what they run; to unload torch takes a process seconds
        for worker in workers:
            worker.kill()
            end_group(worker.pid)


class _Worker:
    """A process that runs one stage at a time, in a pool of its own: `concurrent.futures` gives up a pool as a whole
    when one of its processes dies.
    """

    def __init__(self, num_threads: int) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(1, spawn, initializer=_start_worker, initargs=(num_threads,))
        self._pid = self._pool.submit(os.getpid)

    def submit(self, run: StageRun, report: Path) -> Future[Outcome]:
        """Raises BrokenProcessPool if it has died."""
        return self._pool.submit(execute, run, report)

    def end(self) -> None:
        """Wait for the process to end, and leave none of those that it had started."""
        self._pool.shutdown()
        if self._pid.exception() is None:
            end_group(self._pid.result())


def _wait(future: Future[Outcome], report: Path, on_progress: OnProgress) -> Outcome:
    seen: dict[str, Any] = {}
    while True:
        try:
            return future.result(timeout=POLL_SECONDS)
        except FutureTimeout:
            if future.done():
                return future.result()
        progress = read_progress(report)
        if progress and progress != seen:
            seen = progress
            on_progress(progress)


def _start_worker(num_threads: int) -> None:
    """Live and die with the parent, and keep to this worker's share of the cores."""
    lead_group()
    follow_parent()
    os.environ["OMP_NUM_THREADS"] = str(num_threads)
    import torch

    torch.set_num_threads(num_threads)
