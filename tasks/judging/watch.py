"""How long a process has been asleep, whatever else the machine does meanwhile.

A program may be slow because others have the processors: the kernel counts how long each thread ran and how long it
waited for its turn (/proc/PID/task/*/schedstat). What is left of the time that passed was spent asleep.
"""

import os
import time
from contextlib import suppress
from pathlib import Path


class Watch:
    """Counts from its making. `pid`: the process, or one whose only descendant at the end of the line is watched.

    Args:
        asleep: seconds of sleep that are too many.
        unknown: seconds that are too many where the kernel does not say what they were spent on.
    """

    def __init__(self, pid: int, asleep: float, unknown: float) -> None:
        self.pid = _innermost(pid)
        self._start, self._busy_before = time.monotonic(), _busy_seconds(self.pid)
        self._asleep, self._unknown = asleep, unknown

    def elapsed(self) -> float:
        """Seconds since it was made."""
        return time.monotonic() - self._start

    def num_threads(self) -> int:
        """Of the process; 0 once it has ended."""
        fields = _stat(self.pid)
        return int(fields[17]) if fields else 0

    def remaining(self) -> float:
        """Seconds that the process may at least go on, asleep or not."""
        busy = _busy_seconds(self.pid)
        if busy is None or self._busy_before is None:
            return self._unknown - self.elapsed()
        return self._asleep - (self.elapsed() - (busy - self._busy_before))


def _busy_seconds(pid: int) -> float | None:
    """How long the process has run or waited for a processor; None where that is not known.

    The most of any living thread, or what all threads ran, those that have ended included: threads may take turns.
    """
    threads = []
    for path in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        with suppress(OSError, ValueError):
            ran, waited, _ = map(int, path.read_text().split())
            threads.append(ran + waited)
    return max(max(threads) / 1e9, _processor_seconds(pid)) if any(threads) else None


def _processor_seconds(pid: int) -> float:
    fields = _stat(pid)
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") if fields else 0.0


def _stat(pid: int) -> list[str]:
    """The fields of proc_pid_stat(5) from the third on; none for a process that has ended."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return []


def _innermost(pid: int) -> int:
    with suppress(OSError):
        while children := Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            pid = int(children[0])
    return pid
