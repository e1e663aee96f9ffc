"""Damage of every kind in every file of a store: seen, told, set aside, never read."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from artifacts import Ref, Store, StoreError, files
from artifacts.files import file_sha256

Damage = Callable[[Path], None]
Flip = Callable[..., None]

PAYLOAD = {"stage": "kd_train", "version": "1", "code": "c", "config": {"steps": 3}, "inputs": {"student": "s1"}}
CONTENTS = {"model.safetensors": b"weights" * 100, "config.json": b'{"a": 1}', "qat/scheme.json": b"{}"}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def commit(store: Store) -> Ref:
    folder = store.new_folder()
    for name, content in CONTENTS.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return store.commit(folder, "checkpoint", store.key(PAYLOAD), PAYLOAD, {"metrics": {"loss": 0.25}})


@pytest.mark.parametrize("name", [*CONTENTS, "MANIFEST.json"])
def test_a_damaged_artifact_is_no_hit_and_is_set_aside(
    store: Store, caplog: pytest.LogCaptureFixture, name: str, damage: Damage
) -> None:
    ref, key = commit(store), store.key(PAYLOAD)
    damage(store.folder(ref) / name)
    with caplog.at_level(logging.WARNING, "artifacts"):
        assert Store(store.root).lookup(key, full=True) is None
    [line] = caplog.messages
    assert f"checkpoint:{ref.short}" in line and name in line and len(line) <= 300
    [aside] = (store.root / "quarantine" / "checkpoint").iterdir()
    assert aside.name == f"{ref.digest}-1" and not store._object_path(ref).exists()
    assert [event["event"] for event in store.ledger.events()] == ["commit", "damaged", "quarantined"]
    assert commit(store) == ref
    assert store.lookup(key, full=True) is not None


@pytest.mark.parametrize("name", [*CONTENTS, "MANIFEST.json"])
def test_a_damaged_artifact_is_not_read(store: Store, name: str, damage: Damage) -> None:
    """`path` is the one door to an artifact's files."""
    ref = commit(store)
    damage(store.path(ref) / name)
    with pytest.raises(StoreError, match=r"damaged.*set aside: run its stage again") as caught:
        store.path(ref)
    assert len(str(caught.value)) <= 300
    with pytest.raises(StoreError, match="run its stage again"):
        store.path(ref)


def test_every_bit_of_a_manifest_counts(store: Store, flip_bit: Flip) -> None:
    ref = commit(store)
    manifest = store.folder(ref) / "MANIFEST.json"
    size = manifest.stat().st_size
    for place in range(0, size, 7):
        flip_bit(manifest, place / (size - 1), 1 << place % 8)
        assert store.verify(ref), place
        flip_bit(manifest, place / (size - 1), 1 << place % 8)
        assert not store.verify(ref, full=True)


def test_no_flipped_bit_of_a_record_is_believed(store: Store, flip_bit: Flip) -> None:
    """A flip leaves the record as it was (white space) or makes it unreadable; never another record."""
    commit(store)
    key = store.key(PAYLOAD)
    file, sound = store.root / "records" / f"{key}.json", store.lookup(key)
    size = file.stat().st_size
    unread = 0
    for place in range(0, size, 3):
        flip_bit(file, place / (size - 1), 1 << place % 8)
        found = Store(store.root).lookup(key)
        assert found is None or found == sound, place
        unread += found is None
        flip_bit(file, place / (size - 1), 1 << place % 8)
    assert unread > 0.25 * size
    assert store.lookup(key) == sound


def test_a_damaged_record_is_a_miss_that_the_next_commit_mends(store: Store, damage: Damage) -> None:
    ref, key = commit(store), store.key(PAYLOAD)
    damage(store.root / "records" / f"{key}.json")
    assert store.lookup(key, full=True) is None
    assert list(store.records()) == []
    assert commit(store) == ref
    assert store.lookup(key, full=True) is not None


def test_records_of_the_format_before_are_read(store: Store) -> None:
    commit(store)
    [file] = (store.root / "records").iterdir()
    data = json.loads(file.read_text())
    del data["sha256"]
    file.write_text(json.dumps(data | {"format": 1}))
    assert store.lookup(store.key(PAYLOAD)) is not None
    file.write_text(json.dumps(data))
    assert Store(store.root).lookup(store.key(PAYLOAD)) is None, "the present format without its checksum"


@pytest.mark.parametrize("content", [b"", b'{"event": "com', b"\xff\xfe\n", b"[1]\n"])
def test_a_damaged_ledger_costs_its_line_alone(store: Store, content: bytes) -> None:
    commit(store)
    store.ledger.path.write_bytes(content)
    assert commit(store)
    assert [event["event"] for event in store.ledger.events()] == ["commit"]
    assert store.lookup(store.key(PAYLOAD), full=True) is not None


def test_quarantine_counts_up_and_ignores_what_is_sound(store: Store, flip_bit: Flip) -> None:
    ref = commit(store)
    assert store.quarantine(ref, "nothing is wrong") is None and store.path(ref)
    for number in (1, 2):
        flip_bit(store.folder(ref) / "config.json")
        moved = store.quarantine(ref, "content differs")
        assert moved is not None and moved.name.endswith(f"-{number}")
        commit(store)


def test_a_hash_is_computed_once_while_a_file_stays_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flip_bit: Flip
) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"a" * 1000)
    real, calls = files.hashlib.file_digest, []
    monkeypatch.setattr(files.hashlib, "file_digest", lambda *args: calls.append(args) or real(*args))
    fresh = [file_sha256(file), file_sha256(file)]
    assert len(calls) == 2, "what was written a moment ago may change under the same time stamp"
    monkeypatch.setattr(files, "SETTLED_NS", 0)
    time.sleep(0.01)
    settled = [file_sha256(file), file_sha256(file)]
    assert len(calls) == 3 and len({*fresh, *settled}) == 1
    flip_bit(file)  # the modification time is put back; the change time cannot be
    assert file_sha256(file) not in fresh and len(calls) == 4


def test_copied_and_touched_artifacts_are_sound(store: Store) -> None:
    """Newer time stamps cost a hash, not a recomputation."""
    ref = commit(store)
    os.utime(store.folder(ref) / "config.json")
    assert store.lookup(store.key(PAYLOAD)) is not None
