"""Locks that free themselves: `flock` on a file, which the kernel drops when the owner ends, however it ends.

A lock file holds its owner as JSON, to tell who is being waited for. Threads of one process exclude each
other too. Not re-entrant. Where flock is local to a node (some GPFS set-ups) other hosts are not excluded.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from artifacts.disk import brief
from artifacts.ledger import now

FIRST_POLL_SECONDS = 0.02
LONGEST_POLL_SECONDS = 0.25
LONGEST_COMMAND, LONGEST_SHOWN = 200, 80  # characters

_held: set[int] = set()


def _close_inherited() -> None:
    # A forked worker shares the open file description: it would keep the lock after its parent was killed.
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_close_inherited)

Owner = dict[str, Any]


class FileLock:
    """An exclusive lock at `path`. Use as a context manager, or `try_acquire` / `release`.

    `on_wait(owner)` is called when the lock is found taken, and again when its owner changes.
    """

    def __init__(self, path: Path, on_wait: Callable[[Owner], None] | None = None) -> None:
        self.path = path
        self._on_wait = on_wait
        self._descriptor: int | None = None
        self._pid = 0

    def try_acquire(self) -> bool:
        """Take the lock if it is free. Its last owner may unlink the file meanwhile: then begin again."""
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            _held.add(descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._close(descriptor)
                return False
            if self._is_current(descriptor):
                self._descriptor, self._pid = descriptor, os.getpid()
                with contextlib.suppress(OSError):  # a full disk costs the name in a message, not the lock
                    os.truncate(descriptor, 0)
                    os.pwrite(descriptor, json.dumps(_this_process()).encode(), 0)
                return True
            self._close(descriptor)

    def release(self) -> None:
        """Remove the file, then free the lock: whoever gets a removed file sees it and begins again."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is None or self._pid != os.getpid():  # never taken, or by the process that forked this one
            return
        if self._is_current(descriptor):
            self.path.unlink()
        self._close(descriptor)

    def owner(self) -> Owner:
        """Who holds the lock, as far as it can be read: pid, host, command, since; {} if unknown."""
        with contextlib.suppress(OSError, ValueError):
            owner = json.loads(self.path.read_bytes())
            if isinstance(owner, dict):
                return owner
        return {}

    def acquire(self) -> None:
        """Wait for the lock; signals such as Ctrl-C are served meanwhile."""
        pause, told = FIRST_POLL_SECONDS, None
        while not self.try_acquire():
            owner = self.owner()
            if self._on_wait is not None and owner != told:
                self._on_wait(owner)
                told = owner
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_POLL_SECONDS)

    def __enter__(self) -> FileLock:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _is_current(self, descriptor: int) -> bool:
        try:
            at_path = os.stat(self.path)
        except FileNotFoundError:
            return False
        held = os.fstat(descriptor)
        return (at_path.st_dev, at_path.st_ino) == (held.st_dev, held.st_ino)

    @staticmethod
    def _close(descriptor: int) -> None:
        _held.discard(descriptor)
        os.close(descriptor)


def described(owner: Owner) -> str:
    """Who holds a lock, for a message."""
    if not owner:
        return "another process"
    command = brief(str(owner.get("command", "")), LONGEST_SHOWN)
    return f"process {owner.get('pid')} on {owner.get('host')} ({command}, since {str(owner.get('since'))[:19]})"


def _this_process() -> Owner:
    command = " ".join(sys.argv)[:LONGEST_COMMAND]
    return {"pid": os.getpid(), "host": socket.gethostname(), "command": command, "since": now()}
