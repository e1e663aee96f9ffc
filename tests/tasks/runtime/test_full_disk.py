"""A disk that is full, or a store that cannot be written: one message, nothing half visible, later it goes on."""

from __future__ import annotations

import errno
import importlib
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

from artifacts.store import Store, StoreError
from tasks.runtime.execute import StageRun, execute
from tasks.runtime.stage import StageError

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
stages = importlib.import_module("tests.tasks.runtime.writing_stage")
LIBRARIES = get_args(stages.Library)
WITH_THE_SYSTEM_S_WORDS = [library for library in LIBRARIES if library not in ("torch", "numpy", "sqlite")]


def run_of(store: Store, library: str) -> StageRun:
    return StageRun(stages.writing, stages.WritingConfig(library=library), {}, store.root)


def failure(run: StageRun, limit: int | None) -> Exception:
    """What executing raises, in a process whose files may have `limit` bytes."""
    receiver, sender = multiprocessing.Pipe(duplex=False)

    def child() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            execute(run)
        except Exception as error:
            sender.send((type(error), str(error)))
        else:
            sender.send((None, ""))

    process: Any = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    assert receiver.poll(60)
    kind, text = receiver.recv()
    process.join()
    assert kind is not None, "it fitted"
    return kind(text)


def assert_told(error: Exception, store: Store) -> None:
    assert isinstance(error, StageError | StoreError)
    assert len(str(error)) <= 300
    assert "full" in str(error) and "REASONING_QAT_STORE" in str(error) and "space" in str(error)
    assert not list((store.root / "records").iterdir()) and not list((store.root / "objects").glob("*/*"))
    assert not list((store.root / "tmp").iterdir()), "the space is free again"


@pytest.mark.parametrize("library", WITH_THE_SYSTEM_S_WORDS)
def test_every_library_s_word_for_a_full_disk_is_one_message(tmp_path: Path, library: str) -> None:
    store = Store(tmp_path / "store")
    run = run_of(store, library)
    assert_told(failure(run, 100_000), store)
    assert not execute(run).cached
    assert execute(run).cached


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_disk_that_is_full(small_disk: Path, library: str) -> None:
    store = Store(small_disk / "store")
    assert_told(failure(run_of(store, library), None), store)
    assert not execute(
        StageRun(stages.writing, stages.WritingConfig(library=library, size=20_000), {}, store.root)
    ).cached


def test_a_disk_without_room_for_anything(small_disk: Path) -> None:
    (small_disk / "ballast").write_bytes(b"x" * 400_000)
    while True:
        try:
            with (small_disk / "ballast").open("ab") as file:
                file.write(b"x" * 4096)
        except OSError:
            break
    with pytest.raises((StoreError, StageError), match=r"the disk is full.*free some space") as caught:
        execute(run_of(Store(small_disk / "store"), "python"))
    assert len(str(caught.value)) <= 300


@pytest.fixture
def read_only(small_disk: Path) -> Store:
    store = Store(small_disk / "store")
    execute(StageRun(stages.writing, stages.WritingConfig(library="python", size=9), {}, store.root))
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    return store


def test_a_read_only_store_can_be_read_and_says_that_it_cannot_be_written(read_only: Store) -> None:
    run = StageRun(stages.writing, stages.WritingConfig(library="python", size=9), {}, read_only.root)
    [record] = Store(read_only.root).records()
    assert read_only.path(record.ref)
    assert read_only.lookup(read_only.key(run.payload()), full=True) is not None
    with pytest.raises(StoreError, match=r"not writable.*REASONING_QAT_STORE") as caught:
        execute(run_of(read_only, "python"))
    assert len(str(caught.value)) <= 300


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EPERM])
def test_a_stage_that_may_not_write_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    store = Store(tmp_path / "store")

    def refused(*_: object) -> None:
        raise OSError(number, os.strerror(number), str(tmp_path / "store" / "work" / "file"))

    monkeypatch.setattr(stages, "write", refused)
    with pytest.raises(StageError, match=r"cannot be written.*make it writable.*REASONING_QAT_STORE") as caught:
        execute(run_of(store, "python"))
    assert len(str(caught.value)) <= 300


NO_FOLDERS = ["a file", "below a file", "a link to itself", "\0", "~nobody-of-this-name/x", "x" * 300, "a file in it"]


@pytest.mark.parametrize("kind", NO_FOLDERS)
def test_a_root_that_is_no_folder_is_one_message(tmp_path: Path, kind: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("link")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "records").write_text("")
    roots = {
        "a file": tmp_path / "file",
        "below a file": tmp_path / "file" / "store",
        "a link to itself": tmp_path / "link",
        "a file in it": tmp_path / "store",
        "x" * 300: tmp_path / kind,
    }
    with pytest.raises(StoreError, match="REASONING_QAT_STORE") as caught:
        Store(roots.get(kind, kind))
    assert len(str(caught.value)) <= 300, str(caught.value)
