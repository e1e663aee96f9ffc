"""What an execution tells while it goes on: the latest progress and its notes in a small file, its output in a log."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LOG_FILE = "stage.log"
PROGRESS_INTERVAL_S = 0.5


def progress_file(scratch: Path) -> Path:
    """Where the workers of this process's runs report: two runs that want the same key have a file each."""
    return scratch / f"progress-{os.getpid()}.json"


class Progress:
    """A sink that keeps the latest progress in a file, written at most twice a second, for whoever watches.

    Notes, one line each for the user, ride along with all that follows; they are written at once.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._last = 0.0
        self._lock = threading.Lock()  # a watchdog reports from a thread of its own
        self.notes: list[str] = []
        self._progress: dict[str, Any] = {"done": 0, "total": 1, "unit": "", "info": {}, "notes": self.notes}

    def __call__(self, progress: dict[str, Any]) -> None:
        with self._lock:
            self._progress |= progress
            now = time.monotonic()
            if now - self._last >= PROGRESS_INTERVAL_S or progress["done"] >= progress["total"]:
                self._last = now
                self._write()

    def note(self, text: str) -> None:
        with self._lock:
            self.notes.append(text)
            with contextlib.suppress(FileNotFoundError):  # whom this run waited for took the folder away
                self._write()

    def _write(self) -> None:
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self._progress, default=str))
        os.replace(temporary, self._path)


def read_progress(path: Path) -> dict[str, Any]:
    """The latest progress; {} where there is none."""
    try:
        progress = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return progress if isinstance(progress, dict) else {}


class _Noting(logging.Handler):
    """What the store and the scratch folder say of damage reaches the user, and the log."""

    def __init__(self, progress: Progress) -> None:
        super().__init__(logging.WARNING)
        self._progress = progress

    def emit(self, record: logging.LogRecord) -> None:
        print(record.getMessage(), file=sys.stderr, flush=True)
        self._progress.note(record.getMessage())


@contextlib.contextmanager
def noting(progress: Progress) -> Iterator[None]:
    """Inside, warnings of `artifacts` become notes."""
    logger, handler = logging.getLogger("artifacts"), _Noting(progress)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


@contextlib.contextmanager
def log_into(path: Path) -> Iterator[None]:
    """Send what the stage and its libraries print to a log file; the console belongs to the flow."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with path.open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for target, copy in zip((1, 2), saved, strict=True):
            os.dup2(copy, target)
            os.close(copy)
