"""Files one by one: their hash, taken once per process while they stay as they are; flushed; moved aside."""

from __future__ import annotations

import hashlib
import itertools
import os
import time
from pathlib import Path

SETTLED_NS = 1_000_000_000
"""A file changed less than this ago may change again under the same time stamp: its hash is not remembered."""

_hashes: dict[tuple[str, int, int, int, int, int], str] = {}


def file_sha256(path: Path) -> str:
    """sha256 of a file's contents: 1.6 GiB a CPU second with SHA instructions, about 5 s for 8 GB.

    A process that asks again gets what it computed before, as long as the file's device, inode, size and both time
    stamps are the same.  Nothing is remembered beyond the process: a disk that rots changes no time stamp.
    """
    with path.open("rb") as stream:
        before = _identity(path, os.fstat(stream.fileno()))
        if before in _hashes:
            return _hashes[before]
        found = hashlib.file_digest(stream, "sha256").hexdigest()
        state = os.fstat(stream.fileno())
    settled = time.time_ns() - max(state.st_mtime_ns, state.st_ctime_ns) > SETTLED_NS
    if settled and _identity(path, state) == before:
        _hashes[before] = found
    return found


def _identity(path: Path, state: os.stat_result) -> tuple[str, int, int, int, int, int]:
    return str(path), state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns


def flush(path: Path) -> None:
    """fsync a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def move_aside(path: Path, target: Path) -> Path:
    """Rename a file or a folder to `target`-1, or the first number that is free; returns where it is now."""
    target.parent.mkdir(parents=True, exist_ok=True)
    names = (target.with_name(f"{target.name}-{n}") for n in itertools.count(1))
    free = next(name for name in names if not os.path.lexists(name))
    os.rename(path, free)
    return free
