"""Stages as Prefect tasks: the one file under tasks/ that imports Prefect.

The store is the only cache.  A verified hit is returned to Prefect as a state named Cached, so the UI shows it as such;
Prefect's own result records are not used, because they can outlive the artifact they point to, and because their locks
survive a killed owner.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, cast

from prefect import State, Task, task
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed

from artifacts.refs import Ref
from tasks.runtime.execute import Outcome, StageRun, find_cached
from tasks.runtime.executor import StageExecutor
from tasks.runtime.stage import Stage, StageError

UI_INTERVAL_S = 5.0


@dataclass(frozen=True)
class TaskOptions:
    """How a task runs, as opposed to what it computes."""

    executor: StageExecutor
    only_cached: bool = False
    fresh_process: bool = False
    on_event: Callable[[str, dict[str, Any]], None] = field(default=lambda label, event: None)


def stage_task(stage: Stage) -> Task[..., Outcome]:
    """The Prefect task of a stage; its result is the stage's `Outcome`."""

    @task(name=stage.name, task_run_name="{label}", cache_policy=NO_CACHE, persist_result=False, log_prints=False)
    def run_stage(label: str, run: StageRun, options: TaskOptions, inputs: dict[str, Outcome]) -> State[Outcome]:
        run = replace(run, inputs={name: outcome.ref for name, outcome in inputs.items()})
        try:
            outcome = find_cached(run) or _compute(label, run, options)
        except Exception as error:
            if not options.executor.ended:
                options.on_event(label, {"state": "failed", "error": error})
            raise
        options.on_event(label, {"state": "cached" if outcome.cached else "done", "outcome": outcome})
        if outcome.cached:
            return Completed(name="Cached", message=f"cache hit: {_describe(outcome.ref)}", data=outcome)
        return Completed(message=f"computed: {_describe(outcome.ref)}", data=outcome)

    # Prefect unwraps a returned state: callers get its data.
    return cast("Task[..., Outcome]", run_stage)


def _compute(label: str, run: StageRun, options: TaskOptions) -> Outcome:
    if options.only_cached and not run.force:
        raise StageError(
            f"{label}: not in the cache, and --only-cached was given; run without it to compute this stage"
        )
    show = _ProgressArtifact(label)
    on_event = options.on_event

    def on_progress(progress: dict[str, Any]) -> None:
        on_event(label, {"state": "running", **progress})
        if progress:
            show(progress)

    outcome = options.executor.run(run, on_progress, fresh=options.fresh_process)
    show.finish()
    return outcome


class _ProgressArtifact:
    """A Prefect progress artifact, made when a stage first reports and refreshed every few seconds.

    Only to be looked at: a server that is away costs the stage nothing.
    """

    def __init__(self, label: str) -> None:
        self._label = label
        self._id: Any = None
        self._last = 0.0

    def __call__(self, progress: dict[str, Any]) -> None:
        now = time.monotonic()
        if now - self._last < UI_INTERVAL_S:
            return
        self._last = now
        self._set(100.0 * progress["done"] / max(progress["total"], 1))

    def finish(self) -> None:
        if self._id is not None:
            self._set(100.0)

    def _set(self, percent: float) -> None:
        try:
            if self._id is None:
                self._id = create_progress_artifact(progress=percent, description=self._label)
            else:
                update_progress_artifact(artifact_id=self._id, progress=percent)
        except Exception as error:
            logging.getLogger(__name__).warning("no progress shown for %s: %s", self._label, error)


def _describe(ref: Ref) -> str:
    return f"{ref.kind} {ref.short}"
