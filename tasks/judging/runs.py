"""One run of a program: what it may use, how it is started, read and ended, and what its end says of it."""

import os
import select
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Literal

from tasks.judging import code_driver, isolation
from tasks.judging.watch import Watch

# Until the driver is ready, which takes 0.1 s, and much longer on a busy machine.
STARTUP_SECONDS = 60.0
# As multiples of a run's processor time: time asleep; time, where the kernel does not tell sleep from waiting for
# others; time after which the machine is too busy for any verdict.
SLEEP_FACTOR, UNKNOWN_FACTOR, WALL_FACTOR = 4, 20, 200
# How often a run is looked at.
_LOOK_SECONDS = 0.5

# The whole environment. The hash seed makes runs repeatable; one thread keeps numpy within the limits.
_ENVIRONMENT = {
    "HOME": "/tmp",
    "LC_ALL": "C.UTF-8",
    "PYTHONPATH": isolation.PACKAGES,
    "PYTHONHASHSEED": "0",
    "OPENBLAS_NUM_THREADS": "1",
}
End = Literal["exited", "failed", "timeout", "slept", "killed", "output_limit"]

# By these signals the kernel ends who has used up its time; the second is also the last word on memory. bwrap reports
# a signal as 128 + its number, Popen as its negative.
_OUT_OF_TIME, _KILLED = ({128 + number, -number} for number in (signal.SIGXCPU, signal.SIGKILL))


@dataclass(frozen=True)
class Limits:
    """What one run may use; `memory_bytes` is address space, `file_bytes` holds for each file and for all of /tmp.

    `files` is how many names /tmp may hold when the parent looks, twice a second, and `threads` how many threads there
    may be: the kernel exempts root from its own limit on them, and knows none on names.
    """

    cpu_seconds: int = 6
    memory_bytes: int = 2 * 2**30
    file_bytes: int = 16 * 2**20
    open_files: int = 64
    threads: int = 64
    files: int = 1000

    def rlimits(self) -> dict[str, int]:
        """The limits that the kernel enforces on any process, by their names in `resource`."""
        return {
            "RLIMIT_CPU": self.cpu_seconds,
            "RLIMIT_AS": self.memory_bytes,
            "RLIMIT_FSIZE": self.file_bytes,
            "RLIMIT_NOFILE": self.open_files,
            "RLIMIT_CORE": 0,
        }


@dataclass(frozen=True)
class Run:
    """`failed`: by an uncaught exception or a signal; `timeout`: too much processor time; `slept`: too much sleep.

    `killed`: by a signal that none of its limits explains; the machine may have been short of memory.
    """

    output: bytes
    end: End


@contextmanager
def started(
    command: list[str], stdin: bytes, descriptors: tuple[int, ...] = (), folder: str = "/"
) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """The process, in a group of its own that is gone afterwards, and a descriptor of its stderr."""
    with isolation.memory_file(stdin) as standard_input, isolation.memory_file(b"") as errors:
        process = subprocess.Popen(
            command,
            stdin=standard_input,
            stdout=subprocess.PIPE,
            stderr=errors,
            bufsize=0,
            env=_ENVIRONMENT,
            pass_fds=descriptors,
            cwd=folder,
            start_new_session=True,
        )
        try:
            yield process, errors
        finally:
            _end(process)
            process.stdout.close()  # type: ignore[union-attr]


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of the group; bwrap's death kills all that runs in it."""
    if process.returncode is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def collect(process: subprocess.Popen[bytes], errors: int, limits: Limits, max_output_bytes: int) -> Run:
    """Read what the program writes until it ends, has slept too long or has written too much."""
    assert process.stdout is not None
    stdout = process.stdout.fileno()
    if not _is_readable(stdout, STARTUP_SECONDS) or os.read(stdout, len(code_driver.READY)) != code_driver.READY:
        said = os.pread(errors, 2000, 0).decode(errors="replace").strip()
        raise RuntimeError(f"a sandboxed Python did not start: {said or 'it said nothing'}")
    watch = Watch(process.pid, SLEEP_FACTOR * limits.cpu_seconds, UNKNOWN_FACTOR * limits.cpu_seconds)
    output = bytearray()
    try:
        while len(output) <= max_output_bytes:
            _wait(stdout, watch, limits)
            if not (chunk := os.read(stdout, 65536)):
                break
            output += chunk
        if len(output) > max_output_bytes:
            return Run(bytes(output), "output_limit")
        _wait_for_end(process, watch, limits)
    except _Stopped as stopped:
        return Run(bytes(output), stopped.end)
    _end(process)
    return Run(bytes(output), _end_of(process.returncode, watch.elapsed() < limits.cpu_seconds))


class _Stopped(Exception):
    """The program has had more than its share of something that the kernel does not limit."""

    def __init__(self, end: End) -> None:
        self.end = end


def _end_of(status: int, early: bool) -> End:
    """What an exit status says; `early`: before its processor time can have been over."""
    if status in _OUT_OF_TIME or (status in _KILLED and not early):
        return "timeout"
    return "killed" if status in _KILLED else "failed" if status else "exited"


def _wait_for_end(process: subprocess.Popen[bytes], watch: Watch, limits: Limits) -> None:
    """It stays a zombie, so that its group's number is still its own."""
    descriptor = os.pidfd_open(process.pid)
    try:
        _wait(descriptor, watch, limits)
    finally:
        os.close(descriptor)


def _wait(descriptor: int, watch: Watch, limits: Limits) -> None:
    """Until there is something to read; _Stopped where the program has slept too long or has too much."""
    while True:
        if watch.num_threads() > limits.threads or _num_files(watch.pid) > limits.files:
            raise _Stopped("failed")
        if (remaining := watch.remaining()) <= 0:
            raise _Stopped("slept")
        if _is_readable(descriptor, min(remaining, _LOOK_SECONDS)):
            return
        if watch.elapsed() > WALL_FACTOR * limits.cpu_seconds:
            raise RuntimeError(
                f"a program got less than {limits.cpu_seconds} s of processor time in {watch.elapsed():.0f} s, so that "
                "it cannot be judged: this machine is too busy; run again with less beside it"
            )


def _num_files(pid: int) -> int:
    """How many names a sandboxed program has in its /tmp, whose number no mount option of bwrap limits."""
    try:
        usage = os.statvfs(f"/proc/{pid}/root/tmp")
    except OSError:
        return 0  # it has ended
    return usage.f_files - usage.f_ffree


def _is_readable(descriptor: int, seconds: float) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(seconds * 1000))
