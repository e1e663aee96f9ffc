"""What a store promises: whole artifacts or none, hits that are checked, differences in words."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from artifacts import Record, Ref, Store, StoreError

Payload = dict[str, Any]


def payload(**config: Any) -> Payload:
    return {"stage": "kd_train", "version": "1", "code": "c", "config": config, "inputs": {"student": "s1"}}


def commit(
    store: Store,
    content: str = "weights",
    what: Payload | None = None,
    telemetry: Path | None = None,
    **provenance: Any,
) -> Ref:
    what = payload() if what is None else what
    folder = store.new_folder()
    (folder / "qat").mkdir()
    (folder / "qat" / "scheme.json").write_text("{}")
    (folder / "model.safetensors").write_text(content)
    return store.commit(folder, "checkpoint", store.key(what), what, provenance, telemetry=telemetry)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def leftovers(store: Store) -> list[str]:
    return sorted(os.listdir(store.root / "tmp")) + sorted(os.listdir(store.root / "locks"))


def test_commit_then_lookup(store: Store) -> None:
    ref = commit(store, metrics={"loss": 0.5})
    record = store.lookup(store.key(payload()))
    assert record is not None
    assert (record.ref, record.payload, record.provenance) == (ref, payload(), {"metrics": {"loss": 0.5}})
    assert (store.path(ref) / "model.safetensors").read_text() == "weights"
    assert (store.path(ref) / "model.safetensors").stat().st_mode & 0o777 == 0o444
    assert store.verify(ref, full=True) == []
    assert leftovers(store) == []
    [event] = store.ledger.events()
    assert (event["event"], event["ref"], event["payload"]) == ("commit", str(ref), payload())


def test_telemetry_is_an_artifact_that_the_record_names(store: Store, tmp_path: Path) -> None:
    def measured(text: str) -> Path:
        folder = store.scratch("0" * 64) / "telemetry"
        folder.mkdir()
        (folder / "seconds").write_text(text)
        return folder

    ref = commit(store, telemetry=measured("1.5"))
    assert commit(store, telemetry=measured("2.5")) == ref
    record = store.lookup(store.key(payload()))
    assert record is not None and record.telemetry is not None
    assert (store.path(record.telemetry) / "seconds").read_text() == "2.5"
    assert Record.from_json(record.to_json()) == record
    old = {name: value for name, value in record.to_dict().items() if name != "telemetry"} | {"format": 1}
    assert Record.from_json(json.dumps(old).encode()).telemetry is None, "records of earlier versions are read"
    assert leftovers(store) == []


def test_digest_is_that_of_the_files_alone(tmp_path: Path) -> None:
    one = commit(Store(tmp_path / "a"), "w", payload(seed=1))
    assert commit(Store(tmp_path / "b"), "w", payload(seed=2), seconds=3.0) == one
    assert commit(Store(tmp_path / "a"), "v", payload(seed=1)) != one


def test_the_same_result_of_another_key_shares_the_artifact(store: Store) -> None:
    one, other = commit(store, "w", payload(seed=1)), commit(store, "w", payload(seed=2))
    assert one == other
    assert len(list(store.records())) == 2
    assert leftovers(store) == []


def _commit_often(root: Path, seed: int) -> None:
    for _ in range(5):
        commit(Store(root), "w", payload(seed=seed))


def test_processes_that_commit_the_same_files_at_once(store: Store) -> None:
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=_commit_often, args=(store.root, seed)) for seed in (1, 1, 2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    first, second = store.records()
    assert first.ref == second.ref
    assert store.verify(first.ref, full=True) == []
    assert [event["event"] for event in store.ledger.events()] == ["commit"] * 15
    assert leftovers(store) == []


def test_provenance_takes_what_metrics_hold(store: Store) -> None:
    import numpy as np

    commit(store, loss=float("nan"), reward=np.float32(0.5), path=Path("x"), steps=np.int64(3))
    record = store.lookup(store.key(payload()))
    assert record is not None
    assert record.provenance == {"loss": None, "reward": 0.5, "path": "x", "steps": 3}


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "folder deleted": (shutil.rmtree, "artifact missing: no folder"),
    "file deleted": (
        lambda p: (p / "model.safetensors").unlink(),
        "artifact missing: file model.safetensors",
    ),
    "inner file deleted": (
        lambda p: (p / "qat/scheme.json").unlink(),
        "artifact missing: file qat/scheme.json",
    ),
    "truncated": (
        lambda p: _write(p / "model.safetensors", "wei"),
        "size differs: model.safetensors has 3 bytes",
    ),
    "manifest deleted": (lambda p: (p / "MANIFEST.json").unlink(), "artifact missing: file MANIFEST.json"),
    "manifest cut": (lambda p: _write(p / "MANIFEST.json", '{"files": ['), "manifest unreadable"),
    "manifest emptied": (
        lambda p: _write(p / "MANIFEST.json", '{"files": []}'),
        "manifest describes another",
    ),
    "file added": (lambda p: _write(p / "adapter_config.json", "{}"), "unexpected file: adapter_config.json"),
}


def _write(path: Path, text: str) -> None:
    if path.exists():
        path.chmod(0o644)
    path.write_text(text)


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found_told_and_repaired(store: Store, name: str) -> None:
    damage, reason = DAMAGE[name]
    ref, key = commit(store), store.key(payload())
    damage(store.path(ref))
    assert store.lookup(key) is None
    assert store.lookup(key) is None
    assert reason in store.explain(key)
    [event] = [event for event in store.ledger.events() if event["event"] == "damaged"]
    assert event["key"] == key
    assert reason in event["reason"]
    assert commit(store) == ref
    assert store.lookup(key, full=True) is not None
    assert leftovers(store) == []


def test_an_edit_of_the_same_size_is_found_without_the_full_check(store: Store) -> None:
    ref, key = commit(store), store.key(payload())
    _write(store.path(ref) / "model.safetensors", "WEIGHTS")
    assert store.lookup(key) is None
    assert "content differs: model.safetensors" in store.explain(key)


def test_same_size_damage_that_leaves_no_time_stamp_needs_the_full_check_and_is_repaired(store: Store) -> None:
    ref, key = commit(store), store.key(payload())
    file = store.path(ref) / "model.safetensors"
    before = file.stat()
    _write(file, "WEIGHTS")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert store.lookup(key) is not None
    assert store.verify(ref, full=True) == [
        "content differs: model.safetensors does not have the sha256 of the manifest"
    ]
    assert store.lookup(key, full=True) is None
    commit(store)
    assert store.verify(ref, full=True) == []


def test_hidden_files_of_other_programs_are_no_damage(store: Store) -> None:
    ref = commit(store)
    (store.path(ref) / ".DS_Store").write_text("x")
    assert store.lookup(store.key(payload())) is not None


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null", '{"key": 1}'])
def test_a_broken_record_is_a_miss(store: Store, text: str) -> None:
    commit(store)
    key = store.key(payload())
    (store.root / "records" / f"{key}.json").write_text(text)
    assert store.lookup(key) is None
    assert "record unreadable" in store.explain(key)
    assert list(store.records()) == []
    assert store.nearest(payload()) is None


def test_a_record_under_another_key_is_a_miss(store: Store) -> None:
    commit(store)
    other = store.key(payload(seed=2))
    shutil.copy(store.root / "records" / f"{store.key(payload())}.json", store.root / "records" / f"{other}.json")
    assert store.lookup(other) is None
    assert "another key" in store.explain(other)


def test_no_record(store: Store) -> None:
    assert store.lookup("0" * 64) is None
    assert store.explain("0" * 64) == "no record"
    assert list(store.ledger.events()) == []


def _copied_manifest(folder: Path) -> None:
    (folder / "MANIFEST.json").write_text("{}")


def _link(folder: Path) -> None:
    (folder / "link").symlink_to("/etc/hostname")


@pytest.mark.parametrize(
    ("prepare", "message"),
    [(lambda folder: None, "no files"), (_link, "link"), (_copied_manifest, "store's own")],
)
def test_what_is_no_artifact_is_refused(store: Store, prepare: Callable[[Path], None], message: str) -> None:
    folder = store.new_folder()
    prepare(folder)
    with pytest.raises(StoreError, match=message):
        store.commit(folder, "checkpoint", store.key(payload()), payload(), {})
    assert leftovers(store) == []


POINTS = [*(("fsync", call) for call in range(1, 10)), ("chmod", 1), ("chmod", 3), ("mkdir", 3)]
POINTS += [("rename", 1), ("replace", 1), ("write", 1)]


@pytest.mark.parametrize(("function", "call"), POINTS)
def test_a_full_disk_leaves_nothing_half(
    store: Store, monkeypatch: pytest.MonkeyPatch, function: str, call: int
) -> None:
    real, calls = getattr(os, function), []

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(os, function, failing)
        with pytest.raises(StoreError, match=r"disk is full.*free space.*REASONING_QAT_STORE") as caught:
            commit(store)
    assert isinstance(caught.value.__cause__, OSError)
    assert leftovers(store) == []
    assert all(store.verify(store.resolve(name), full=True) == [] for name in _object_names(store))
    record = store.lookup(store.key(payload()), full=True)
    assert (record is not None) == ((function, call) in [("fsync", 8), ("fsync", 9), ("write", 1)])
    assert store.verify(commit(store), full=True) == []


def _object_names(store: Store) -> list[str]:
    return [path.name for path in (store.root / "objects").glob("*/*")]


def test_a_root_that_cannot_be_made_names_the_variable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="REASONING_QAT_STORE"):
        Store(tmp_path / "file" / "store")


def test_root_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REASONING_QAT_STORE", str(tmp_path / "elsewhere"))
    assert Store().root == tmp_path / "elsewhere"


def test_discard_and_folders_in_use_survive_another_opening(store: Store) -> None:
    folder = store.new_folder()
    Store(store.root)
    assert folder.is_dir()
    store.discard(folder)
    assert not folder.exists()
    (store.root / "tmp" / ".tmp-dead").mkdir()
    (store.root / "tmp" / ".tmp-dead" / "model").write_text("half")
    Store(store.root)
    assert leftovers(store) == []


def test_keys_and_payloads_are_checked(store: Store) -> None:
    with pytest.raises(ValueError, match="fields"):
        store.key({"stage": "kd"})
    with pytest.raises(ValueError, match="64"):
        store.scratch("../../etc")
    folder = store.new_folder()
    with pytest.raises(ValueError, match="not the key"):
        store.commit(folder, "checkpoint", "0" * 64, payload(), {})


def test_scratch_survives_and_is_cleared(store: Store) -> None:
    (store.scratch("0" * 64) / "step").write_text("3")
    assert (Store(store.root).scratch("0" * 64) / "step").read_text() == "3"
    store.clear_scratch("0" * 64)
    assert list(store.scratch("0" * 64).iterdir()) == []


def test_resolve(store: Store) -> None:
    refs = [commit(store, str(index), payload(seed=index)) for index in range(20)]  # 20 > 16: a shared first digit
    assert all(store.resolve(ref.short) == store.resolve(f"checkpoint:{ref.short}") == ref for ref in refs)
    assert store.resolve(str(refs[0])) == refs[0]
    digits = [ref.digest[0] for ref in refs]
    twice = next(digit for digit in digits if digits.count(digit) > 1)
    with pytest.raises(StoreError, match=r"ambiguous: checkpoint:.*Give more digits"):
        store.resolve(twice)
    for nothing in ("", "zzz", "dataset:" + refs[0].short, "checkpoint:", "../tmp:0"):
        with pytest.raises(StoreError, match="no artifact begins with"):
            store.resolve(nothing)


def test_path_of_a_missing_artifact(store: Store) -> None:
    with pytest.raises(StoreError, match="run its stage again"):
        store.path(Ref("checkpoint", "0" * 64))


def test_ref_parses_what_it_prints() -> None:
    ref = Ref("teacher_topk", "0123456789ab" + "0" * 52)
    assert Ref.parse(str(ref)) == ref
    assert ref.short == "0123456789ab"
    for wrong in (
        "checkpoint",
        "checkpoint:12",
        ":" + "0" * 64,
        "../x:" + "0" * 64,
        "checkpoint:" + "A" * 64,
    ):
        with pytest.raises(ValueError, match="artifact"):
            Ref.parse(wrong)


def test_nearest_tells_what_changed(store: Store) -> None:
    scheme = {"bits": 3, "group_size": 128}
    base = {**payload(learning_rate=1e-5, steps=1, scheme=scheme), "inputs": {"student": "a", "data": "d"}}
    far = {**base, "config": {"learning_rate": 1.0, "steps": 9, "scheme": {"bits": 8, "group_size": -1}}}
    for what in (base, far, {**base, "stage": "sft_train"}):
        commit(store, "w", what)
    config = {"learning_rate": 2e-5, "steps": 1.0, "scheme": {"bits": 2, "group_size": 128, "rule": "paper"}}
    wanted = {
        **base,
        "version": "2",
        "code": "new",
        "config": config,
        "inputs": {"student": "b", "teacher": "t"},
    }
    found = store.nearest(wanted)
    assert found is not None
    record, differences = found
    assert record.payload == base
    assert differences == [
        "version 1 -> 2",
        "code changed",
        "config.learning_rate 1e-05 -> 2e-05",
        "config.scheme.bits 3 -> 2",
        "config.scheme.rule added (paper)",
        "config.steps 1 -> 1.0",
        "input data removed",
        "input student changed",
        "input teacher added",
    ]
    same = store.nearest(base)
    assert same is not None
    assert same[1] == []
    assert store.nearest({**base, "stage": "grpo_train"}) is None


def test_the_newest_of_equally_near_records_is_chosen(store: Store) -> None:
    for seed in (1, 2, 3):
        commit(store, "w", payload(seed=seed))
    found = store.nearest(payload(seed=4))
    assert found is not None
    assert found[1] == ["config.seed 3 -> 4"]


def test_ten_thousand_records_are_listed_quickly(store: Store) -> None:
    for index in range(10_000):
        what = payload(seed=index, betas=[0.9, 0.95], scheme={"bits": 3}, text="x" * 500)
        record = Record(f"{index:064x}", what, Ref("checkpoint", "0" * 64), {"metrics": {}}, f"{index:06}")
        (store.root / "records" / f"{record.key}.json").write_bytes(record.to_json())
    started = time.process_time()
    assert [record.payload["config"]["seed"] for record in store.records()] == list(range(10_000))
    first, started = time.process_time() - started, time.process_time()
    found = store.nearest(payload(seed=1))
    assert found is not None
    assert first < 2.0
    assert time.process_time() - started < 2.0
