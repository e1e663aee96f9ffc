"""One stage under its key: hits are verified, kills resume, failures leave nothing behind."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import socket
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from artifacts.store import Store
from tasks.runtime import machine
from tasks.runtime.execute import StageRun, execute, find_cached
from tasks.runtime.executor import StageExecutor
from tasks.runtime.progress import Progress, read_progress
from tasks.runtime.stage import StageError

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
toys = importlib.import_module("tests.tasks.runtime.toy_stages")  # the name by which worker processes find it


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def source_run(store: Store, text: str = "hello", **more: Any) -> StageRun:
    return StageRun(toys.source, toys.SourceConfig(text=text, **more), {}, store.root)


def upper_run(store: Store, text: str = "hello", **config: Any) -> StageRun:
    ref = execute(source_run(store, text)).ref
    return StageRun(toys.upper, toys.UpperConfig(**config), {"text": ref}, store.root)


def test_the_second_run_is_a_hit(store: Store, tmp_path: Path) -> None:
    run = source_run(store, runs=str(tmp_path / "runs"))
    first, second = execute(run), execute(run)
    assert (first.cached, second.cached) == (False, True)
    assert first.ref == second.ref and second.metrics == {"length": 5}
    assert (tmp_path / "runs").read_text().count("source") == 1


def test_force_runs_again_and_gives_the_same_artifact(store: Store, tmp_path: Path) -> None:
    run = source_run(store, runs=str(tmp_path / "runs"))
    first = execute(run)
    again = execute(replace(run, force=True))
    assert not again.cached and again.ref == first.ref
    assert (tmp_path / "runs").read_text().count("source") == 2


def test_keys_follow_configuration_inputs_and_sources(store: Store) -> None:
    base = upper_run(store)
    key = store.key(base.payload())
    assert key == store.key(upper_run(store).payload())
    assert key != store.key(upper_run(store, num_steps=4).payload())
    assert key != store.key(upper_run(store, text="other").payload())
    assert key != store.key(replace(base, source_digest="0" * 64).payload())
    assert key == store.key(replace(base, device="cuda", store_root=Path("/elsewhere")).payload())
    assert key == store.key(upper_run(store, patience=9.0).payload()), "a limit keeps what is in scratch"


def measured(store: Store, run: StageRun) -> str:
    record = store.lookup(store.key(run.payload()))
    assert record is not None and record.telemetry is not None
    return (store.path(record.telemetry) / "measured.txt").read_text()


def test_measurements_are_kept_with_the_record_and_in_no_digest(store: Store) -> None:
    run = upper_run(store)
    ref = execute(run).ref
    first = measured(store, run)
    assert first.split()[2] == run.inputs["text"].digest
    assert execute(run).cached and measured(store, run) == first
    assert execute(replace(run, force=True)).ref == ref, "other measurements, the same artifact"
    assert measured(store, run) != first
    assert sorted(path.name for path in store.path(ref).iterdir()) == ["MANIFEST.json", "text.txt"]
    [source_record] = [record for record in store.records() if record.stage == "source"]
    assert source_record.telemetry is None, "a stage that measures nothing has none"


def test_damaged_measurements_cost_no_recomputation(store: Store) -> None:
    run = upper_run(store)
    execute(run)
    record = store.lookup(store.key(run.payload()))
    assert record is not None and record.telemetry is not None
    (store.path(record.telemetry) / "measured.txt").unlink()
    assert execute(run).cached
    assert store.verify(record.telemetry) == ["artifact missing: file measured.txt"]


@pytest.mark.parametrize("damage", ["delete", "truncate"])
def test_a_damaged_artifact_is_found_and_made_again(store: Store, damage: str) -> None:
    run = upper_run(store)
    ref = execute(run).ref
    file = store.path(ref) / "text.txt"
    file.parent.chmod(0o755)
    file.chmod(0o644)
    file.unlink() if damage == "delete" else file.write_text("")
    assert find_cached(run) is None
    again = execute(run)
    assert not again.cached and again.ref == ref
    assert (store.path(ref) / "text.txt").read_text() == "HELLOxxx"


def test_early_cut_off(store: Store) -> None:
    """A stage that runs again and yields the same content leaves what comes after it cached."""
    execute(upper_run(store))
    execute(replace(source_run(store), force=True))
    assert execute(upper_run(store)).cached


@pytest.mark.parametrize("fail", ["mend", "bug", "disk"])
def test_a_failure_names_its_log_and_leaves_no_artifact(store: Store, fail: str) -> None:
    run = upper_run(store, fail=fail)
    before = len(list(store.records()))
    expected = ZeroDivisionError if fail == "bug" else StageError
    with pytest.raises(expected) as caught:
        execute(run)
    assert any("stage.log" in note for note in caught.value.__notes__)
    assert len(list(store.records())) == before
    assert not list((store.root / "tmp").glob(".tmp-*"))
    if fail == "disk":
        assert "space" in str(caught.value)


def test_unknown_and_missing_inputs(store: Store) -> None:
    ref = execute(source_run(store)).ref
    for inputs in ({}, {"text": ref, "texts": ref}):
        with pytest.raises(TypeError, match="missing inputs"):
            execute(StageRun(toys.upper, toys.UpperConfig(), inputs, store.root))


def test_a_killed_stage_resumes_with_the_same_digest(store: Store, tmp_path: Path) -> None:
    run = upper_run(store, stop_at=2)
    child = multiprocessing.get_context("fork").Process(target=execute, args=(run,))
    child.start()
    child.join()
    assert child.exitcode == -9
    assert find_cached(run) is None
    outcome = execute(run)
    assert outcome.metrics == {"resumed_from": 2}
    assert measured(store, run).startswith("2 "), "measurements are of the run that ended"
    other = Store(tmp_path / "undisturbed")
    assert execute(upper_run(other, stop_at=99)).ref == outcome.ref
    assert not store.scratch(store.key(run.payload())).joinpath("steps").exists(), "scratch is cleared"


def test_progress_is_written_whole_and_seldom(tmp_path: Path) -> None:
    write = Progress(tmp_path / "progress.json")
    for done in range(1, 101):
        write({"done": done, "total": 100, "unit": "step", "info": {"loss": 1.0}})
        assert json.loads((tmp_path / "progress.json").read_text())["done"] <= done
    assert json.loads((tmp_path / "progress.json").read_text())["done"] == 100


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff"])
def test_progress_that_cannot_be_read_is_none(tmp_path: Path, content: bytes) -> None:
    assert read_progress(tmp_path / "none") == {}
    (tmp_path / "damaged").write_bytes(content)
    assert read_progress(tmp_path / "damaged") == {}


def test_a_second_run_of_the_same_key_says_whom_it_waits_for(store: Store) -> None:
    run, seen = upper_run(store), []
    executor = StageExecutor(jobs=1, num_threads=1)
    second = threading.Thread(target=lambda: executor.run(run, seen.append))
    try:
        with store.lock(store.key(run.payload())):
            second.start()
            deadline = time.monotonic() + 120
            while not any(event.get("notes") for event in seen) and time.monotonic() < deadline:
                time.sleep(0.05)
        second.join()
    finally:
        executor.close()
    [note] = {note for event in seen for note in event.get("notes", [])}
    assert note.startswith(f"waits for process {os.getpid()} on {socket.gethostname()} (") and len(note) <= 300
    assert execute(run).cached


def test_workers_report_progress_raise_and_survive(store: Store) -> None:
    executor = StageExecutor(jobs=1, num_threads=1)
    try:
        seen: list[int] = []
        outcome = executor.run(upper_run(store, seconds=0.7), lambda p: seen.append(p.get("done", 0)))
        assert not outcome.cached and seen and seen == sorted(seen)
        with pytest.raises(StageError, match="remedy"):
            executor.run(upper_run(store, fail="mend"), lambda p: None)
        killed = upper_run(store, text="killed", stop_at=1)
        with pytest.raises(StageError, match="died"):
            executor.run(killed, lambda p: None, fresh=True)
        resumed = executor.run(killed, lambda p: None, fresh=True)
        assert resumed.metrics == {"resumed_from": 1}
        assert executor.run(upper_run(store, num_steps=1), lambda p: None).metrics == {"resumed_from": 0}
    finally:
        executor.close()


def test_other_code_than_the_keys_is_not_run(store: Store, tmp_path: Path) -> None:
    run = source_run(store, runs=str(tmp_path / "runs"))
    assert run.code is not None
    path, labels = next(iter(run.code.definitions.items()))
    name = next(iter(labels))
    other = replace(run.code, definitions={**run.code.definitions, path: {**labels, name: "0" * 16}})
    with pytest.raises(StageError, match="code changed since the run began: tests/tasks/runtime/toy_stages") as caught:
        execute(replace(run, code=other))
    assert "run the same command again" in str(caught.value) and len(str(caught.value)) <= 300
    assert not (tmp_path / "runs").exists() and list(store.records()) == []


def test_a_difference_of_code_names_the_definition(store: Store) -> None:
    run = source_run(store)
    execute(run)
    assert run.code is not None
    [path] = run.code.definitions
    labels = {**run.definitions[path], "function source": "0" * 16, "import new": "1" * 16}
    edited = replace(run, code=replace(run.code, digest="f" * 64, definitions={path: labels}))
    found = store.nearest(edited.payload(), edited.definitions)
    assert found is not None
    assert found[1] == [f"code: {path} function source changed, and 1 more"]
    for file in (store.root / "code").iterdir():
        file.write_text("[")
    found = store.nearest(edited.payload(), edited.definitions)
    assert found is not None and found[1] == ["code changed"]


def test_peak_memory_is_the_stages_own(store: Store) -> None:
    big = bytearray(b"x" * (300 * 2**20))
    before = machine.peak_memory_mb()
    del big
    execute(source_run(store))
    [record] = store.records()
    assert before is not None and 0 < record.provenance["peak_memory_mb"] < before - 200


def versioned(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    known = {name.replace("_", "-"): version for name, version in versions.items()}
    monkeypatch.setattr(machine, "_version", known.get)


@pytest.mark.parametrize(
    "package, before, after, same",
    [
        ("torch", "2.8.0", "2.8.1", True),
        ("torch", "2.8.0+cpu", "2.8.0+cu128", True),
        ("torch", "2.8.1", "2.9.0", False),
        ("vllm", "0.20.1", "0.20.2", True),
        ("vllm", "0.20.1", "0.21.0", False),
        ("math-verify", "0.8.0", "0.8.1", False),
        ("lighteval", "0.13.0", "0.13.1", False),
        ("other", "1.0", "2.0", True),
    ],
)
def test_versions_that_decide_a_result_enter_its_key(
    store: Store, monkeypatch: pytest.MonkeyPatch, package: str, before: str, after: str, same: bool
) -> None:
    stage = replace(toys.source, packages=lambda config: ("torch", "vllm", "math-verify", "lighteval", "absent"))
    run = replace(source_run(store), stage=stage)
    versioned(monkeypatch, **{package.replace("-", "_"): before})
    execute(run)
    [record] = store.records()
    versioned(monkeypatch, **{package.replace("-", "_"): after})
    assert (find_cached(run) is not None) == same
    found = store.nearest(run.payload(), run.definitions)
    assert found is not None and (found[1] == []) == same
    assert same or found[1] == [
        f"package {package} {machine._keyed(package, before)} -> {machine._keyed(package, after)}"
    ]
    told = [] if package == "other" else [f"{package} {before} -> {after}"]
    assert machine.version_differences(record) == told


def test_a_stage_that_names_no_package_has_none_in_its_key(store: Store) -> None:
    assert "packages" not in source_run(store).payload()


def test_what_changes_no_bit_stays_out_of_the_key_at_any_depth() -> None:
    from tasks.evaluate import EvaluateConfig

    plain = EvaluateConfig()
    for name, value in (("gpu_memory_utilization", 0.5), ("stall_seconds", 1.0), ("stall_limit_seconds", 9000.0)):
        generation = plain.generation.model_copy(update={name: value})
        assert plain.model_copy(update={"generation": generation}).keyed() == plain.keyed(), name
    other = plain.generation.model_copy(update={"temperature": 0.5})
    assert plain.model_copy(update={"generation": other}).keyed() != plain.keyed()


def test_a_source_that_is_no_python_is_one_message(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_entry: object) -> None:
        raise SyntaxError("invalid syntax", ("quant/methods/awq.py", 167, 1, "def f(", 167, 2))

    monkeypatch.setattr("tasks.runtime.execute.code_of", broken)
    with pytest.raises(StageError, match=r"invalid syntax \(awq\.py, line 167\): mend the file") as caught:
        source_run(store)
    assert len(str(caught.value)) <= 300
