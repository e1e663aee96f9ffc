"""Locks exclude processes and threads, tell who holds them, and outlive no owner."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from artifacts.keys import REPOSITORY
from artifacts.locks import FileLock

HOLDER = """
import sys, time
from pathlib import Path
from artifacts.locks import FileLock
lock = FileLock(Path(sys.argv[1]))
lock.acquire()
print("held", flush=True)
time.sleep(60)
"""


def _holder(path: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLDER, str(path)]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_lock_is_freed_when_its_owner_is_killed_and_waiting_tells_the_owner(tmp_path: Path) -> None:
    process, owners = _holder(tmp_path / "l"), []

    def on_wait(owner: dict[str, object]) -> None:
        owners.append(owner)
        process.send_signal(signal.SIGKILL)

    started = time.monotonic()
    with FileLock(tmp_path / "l", on_wait):
        pass
    process.communicate()
    assert time.monotonic() - started < 10
    assert owners[0]["pid"] == process.pid
    assert {"host", "command", "since"} < set(owners[0])
    assert not (tmp_path / "l").exists()


def test_a_lock_that_is_held_cannot_be_taken_by_another_thread(tmp_path: Path) -> None:
    with FileLock(tmp_path / "l"):
        taken: list[bool] = []
        thread = threading.Thread(target=lambda: taken.append(FileLock(tmp_path / "l").try_acquire()))
        thread.start()
        thread.join()
        assert taken == [False]
    assert FileLock(tmp_path / "l").try_acquire()


def test_a_forked_child_does_not_keep_the_lock(tmp_path: Path) -> None:
    """Worker processes forked while a stage runs may live on for a moment after the stage was killed."""
    lock = FileLock(tmp_path / "l")
    lock.acquire()
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(30,))
    child.start()
    try:
        assert lock._descriptor is not None
        os.close(lock._descriptor)  # what the kernel does when this process is killed: no unlock, only close
        deadline = time.monotonic() + 10  # the child may not yet have run its first lines
        while not FileLock(tmp_path / "l").try_acquire():
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        child.kill()
        child.join()


def test_release_in_a_forked_child_leaves_the_parents_lock(tmp_path: Path) -> None:
    lock = FileLock(tmp_path / "l")
    lock.acquire()
    child = multiprocessing.get_context("fork").Process(target=lock.release)
    child.start()
    child.join()
    assert child.exitcode == 0
    assert not FileLock(tmp_path / "l").try_acquire()
    lock.release()


def test_owner_of_a_damaged_lock_file_is_unknown(tmp_path: Path) -> None:
    (tmp_path / "l").write_text('{"pid": 1')
    assert FileLock(tmp_path / "l").owner() == {}
    assert FileLock(tmp_path / "none").owner() == {}


def _increment(folder: Path, times: int) -> None:
    for _ in range(times):
        with FileLock(folder / "l"):
            counter = folder / "counter"
            value = int(counter.read_text())
            counter.write_text("")  # a second holder would read this
            counter.write_text(str(value + 1))


def test_stress(tmp_path: Path) -> None:
    (tmp_path / "counter").write_text("0")
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=_increment, args=(tmp_path, 40)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert (tmp_path / "counter").read_text() == "160"


@pytest.mark.parametrize("times", [1, 2])
def test_release_may_be_called_again(tmp_path: Path, times: int) -> None:
    lock = FileLock(tmp_path / "l")
    lock.acquire()
    for _ in range(times):
        lock.release()
    assert lock.try_acquire()
