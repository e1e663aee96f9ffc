"""Run one stage under its key: look up, lock, run the body, commit.  Knows the store; knows nothing of Prefect."""

from __future__ import annotations

import platform
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from artifacts.code import Code, Entry, changed, code_of
from artifacts.disk import ROOT_VARIABLE, brief, is_full, is_unwritable, shown
from artifacts.loaded import loaded_sources
from artifacts.locks import described
from artifacts.refs import Ref
from artifacts.store import Store, StoreError
from tasks.runtime.machine import PACKAGES, keyed_versions, package_versions, peak_memory_mb, reset_peak_memory
from tasks.runtime.progress import LOG_FILE, Progress, log_into, noting, progress_file
from tasks.runtime.stage import TELEMETRY_FOLDER, Context, Metrics, Stage, StageConfig, StageError


@dataclass(frozen=True)
class StageRun:
    """One stage with its configuration and the references of its inputs: all that a worker process needs."""

    stage: Stage
    config: StageConfig
    inputs: Mapping[str, Ref]
    store_root: Path
    device: str = "cpu"
    force: bool = False
    source_digest: str | None = None
    """Content digest of what the stage reads from outside the store (a local model or data set)."""
    code: Code | None = None
    """What the stage runs; taken once where the run is made, and the worker that executes it must have the same."""

    def __post_init__(self) -> None:
        if self.code is None:
            try:
                object.__setattr__(self, "code", code_of(self.entry))
            except SyntaxError as error:
                raise StageError(f"{brief(str(error))}: mend the file, stage {self.stage.name} runs it") from error

    @property
    def definitions(self) -> Mapping[str, Mapping[str, str]]:
        """What its code consists of."""
        assert self.code is not None
        return self.code.definitions

    @property
    def entry(self) -> Entry:
        """Where the stage's code begins, under its configuration."""
        choices = tuple(sorted(self.stage.chooses(self.config).items()))
        return Entry(self.stage.module, self.stage.body.__name__, tuple(sorted(_classes(self.config))), choices)

    def payload(self) -> dict[str, Any]:
        """What the key hashes: never a path of this machine, a device or a date."""
        assert self.code is not None
        self.stage.check_inputs(self.inputs)
        config = self.config.keyed()
        if self.source_digest is not None:
            # Content counts, not where it lies.
            config = {k: v for k, v in config.items() if k not in self.config.location_fields}
            config["source_digest"] = self.source_digest
        packages = keyed_versions(self.stage.packages(self.config))
        return {
            "stage": self.stage.name,
            "version": self.stage.version,
            "code": self.code.digest,
            "config": config,
            "inputs": {name: str(ref) for name, ref in sorted(self.inputs.items())},
            **({"packages": packages} if packages else {}),
        }


def _classes(value: Any) -> set[tuple[str, str]]:
    """The classes of a configuration and of the objects in it, which bring their methods along."""
    if isinstance(value, dict):
        return {found for item in value.values() for found in _classes(item)}
    if isinstance(value, list | tuple | set | frozenset):
        return {found for item in value for found in _classes(item)}
    if isinstance(value, BaseModel) or is_dataclass(value):
        kind = type(value)
        return {(kind.__module__, kind.__qualname__)} | _classes(list(vars(value).values()))
    return set()


@dataclass(frozen=True)
class Outcome:
    """What a stage gave: its artifact, whether it came from the cache, and the record's metrics."""

    ref: Ref
    cached: bool
    metrics: Metrics = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    """What the user should know of this execution, a line each."""


def find_cached(run: StageRun, again: bool = False) -> Outcome | None:
    """The cache hit of this run, every byte of it verified, or None; a forced run never hits.

    What is damaged is set aside, so that the run which asks makes it again before anything reads it.  Who asks `again`
    is not told a second time of what is missing.
    """
    if run.force:
        return None
    store = Store(run.store_root)
    record = store.lookup(store.key(run.payload()), full=True, again=again)
    return None if record is None else Outcome(record.ref, True, record.provenance.get("metrics", {}))


def execute(run: StageRun, report_to: Path | None = None) -> Outcome:
    """Run the stage unless another process has finished the same key meanwhile; commit its artifact.

    Progress and notes, such as whom it waits for, go to the file `report_to`.  Raises StageError for what the user can
    mend; a killed process leaves only its scratch folder, which the next call with the same key resumes from.
    """
    store = Store(run.store_root)
    payload = run.payload()
    key = store.key(payload)
    progress = Progress(report_to or progress_file(store.scratch(key)))
    with store.lock(key, on_wait=lambda owner: progress.note(f"waits for {described(owner)}, which runs this stage")):
        if hit := find_cached(run, again=True):
            return hit
        scratch = store.scratch(key)
        telemetry = scratch / TELEMETRY_FOLDER
        shutil.rmtree(telemetry, ignore_errors=True)  # measurements of an execution that was killed
        output = store.new_folder()
        started = time.perf_counter()
        reset_peak_memory()
        try:
            with log_into(scratch / LOG_FILE), noting(progress):
                _check_code(run)  # before hours are spent, and again before they are believed
                metrics = _run_body(run, store, output, scratch, progress)
                _check_code(run)
            provenance = _provenance(run, metrics, time.perf_counter() - started)
            store.keep_definitions(payload["code"], run.definitions)
            measured = telemetry if telemetry.is_dir() else None
            ref = store.commit(output, run.stage.kind, key, payload, provenance, telemetry=measured)
        except Exception as error:
            told = _explained(error, store) or error
            told.add_note(f"The log of stage {run.stage.name}: {scratch / LOG_FILE}")
            raise told from (error if told is not error else None)
        finally:
            store.discard(output)
        store.clear_scratch(key)
    return Outcome(ref, False, metrics, tuple(progress.notes))


def _explained(error: Exception, store: Store) -> StageError | None:
    """What a full or read-only disk means to the user, if that is what happened, whichever library met it."""
    if isinstance(error, StageError | StoreError):
        return None
    if is_full(error, store.root):
        cause, remedy = "the disk is full", "free some space"
    elif is_unwritable(error):
        cause, remedy = "a file cannot be written", "make it writable"
    else:
        return None
    return StageError(
        f"{cause} ({brief(str(error), 70)}; store {shown(store.root)}). Nothing finished was lost: {remedy}, or set "
        f"{ROOT_VARIABLE} to another folder, and run the same command again"
    )


def _check_code(run: StageRun) -> None:
    """Refuse to go on when this process does not have the code that the run's key stands for."""
    assert run.code is not None
    found = changed(run.code, run.entry, loaded_sources())
    if found:
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        raise StageError(
            f"code changed since the run began: {found[0]}{more}. Stage {run.stage.name} was not committed, because "
            "its result would stand under the old code's key; run the same command again"
        )


def _run_body(run: StageRun, store: Store, output: Path, scratch: Path, progress: Progress) -> Metrics:
    inputs = {name: store.path(ref) for name, ref in run.inputs.items()}
    digests = {name: ref.digest for name, ref in run.inputs.items()}
    context = Context(output, scratch, run.device, progress, digests, run.source_digest)
    return run.stage(run.config, context, **inputs)


def _provenance(run: StageRun, metrics: Metrics, seconds: float) -> dict[str, Any]:
    """Host-independent facts of a run; they are recorded beside the artifact and do not enter its digest."""
    return {
        "metrics": metrics,
        "wall_seconds": round(seconds, 3),
        "peak_memory_mb": peak_memory_mb(),
        "python": platform.python_version(),
        "versions": package_versions({*PACKAGES, *run.stage.packages(run.config)}),
    }
