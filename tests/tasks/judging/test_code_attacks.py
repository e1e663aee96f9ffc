"""Attacks on the code verifier, as hostile model output would make them: none is graded correct, none reaches anything
outside, none hangs, and the grader goes on grading."""

import json
import os
import secrets
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import pytest

from tasks.judging import code_driver
from tasks.judging.code_answer import CodeGrader, CodeVerdict
from tasks.judging.sandbox import Limits, Sandbox, why_unavailable
from tests.tasks.judging.responses import grade_code

pytestmark = pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))

LIMITS = Limits(cpu_seconds=1, memory_bytes=2**29)
# One second of processor time, four of wall time; the rest is for a busy machine.
MOST_SECONDS = 20.0
# All of EXCESSES, most of which use up their time, four at once.
MOST_SECONDS_TOGETHER = 120.0
# What a thief looks for; new in each run, in this process's memory, environment, files and descriptors.
SECRET = f"gold-{secrets.token_hex(16)}"
DOUBLE = json.dumps([{"input": "21", "output": "42", "type": "stdin"}])


@pytest.fixture(scope="module")
def grader() -> Iterator[CodeGrader]:
    with CodeGrader(num_workers=2, limits=LIMITS) as opened:
        yield opened


def respond(program: str) -> str:
    return f"thoughts</think>\n```python\n{program}\n```\n"


def grade_in_time(grader: CodeGrader, program: str, tests: str) -> CodeVerdict:
    """The verdict of a hostile program; a good one beside it must still pass."""
    start = time.monotonic()
    hostile, good = grade_code(grader, [respond(program), respond("print(int(input()) * 2)")], [tests, DOUBLE])
    assert time.monotonic() - start < MOST_SECONDS
    assert good.correct
    return hostile


# Each wants to be graded correct for printing the secret, or returning it, without having been told.
THEFTS = {
    "caller's stack": """
        frame = sys._getframe()
        while frame:
            look(frame.f_globals, frame.f_locals)
            frame = frame.f_back""",
    "all objects": """
        import gc
        for thing in gc.get_objects():
            look(thing)""",
    "environment": "import os\nlook(os.environ)",
    "descriptors": """
        import os
        for number in range(3, 64):
            try:
                os.lseek(number, 0, 0)
            except OSError:
                pass
            try:
                look(os.read(number, 10000))
            except OSError:
                pass""",
    "own files": """
        for path in ("/sandbox/driver.py", "/sandbox/solution.py", "/dev/stdin"):
            look([line for line in open(path) if "look" not in line])""",
    "whole file system": """
        import os
        for folder, _, names in os.walk("/"):
            if not folder.startswith(("/usr", "/lib", "/root", "/sandbox")):
                for name in names:
                    if name not in ("zero", "urandom"):
                        try:
                            look(open(os.path.join(folder, name), "rb").read(100000))
                        except OSError:
                            pass""",
    "parent's memory": """
        import ctypes, os
        libc = ctypes.CDLL(None, use_errno=True)
        for pid in (os.getppid(), 1, 2, 3):
            buffer = ctypes.create_string_buffer(1000)
            look(libc.ptrace(16, pid, None, None), bytes(buffer))""",
    "proc": """
        import os
        for pid in ("1", "self", str(os.getppid())):
            for name in ("environ", "cmdline", "maps", "mem", "fd"):
                try:
                    look(open(f"/proc/{pid}/{name}", "rb").read())
                except OSError:
                    pass""",
    "standard error": """
        import os
        try:
            os.lseek(2, 0, 0)
        except OSError:
            pass
        try:
            look(os.read(2, 10000))
        except OSError:
            pass""",
    "tracing what calls": "sys.settrace(lambda frame, event, arg: look(frame.f_locals, arg))\nsys.setprofile(print)",
    "modules": "import sys\nfor module in list(sys.modules.values()):\n    look(vars(module))",
}
LOOK = """
import re
def look(*things):
    for thing in things:
        for hit in re.findall("gold-[0-9a-f]{32}", repr(thing)):
            print(hit)
            raise SystemExit
"""


@pytest.fixture(scope="module")
def scattered_secret() -> Iterator[None]:
    """The secret in this process's environment, in an inheritable descriptor and in files, as a real answer may be."""
    descriptor, path = tempfile.mkstemp()
    os.write(descriptor, SECRET.encode())
    os.set_inheritable(descriptor, True)
    os.environ["EXPECTED_OUTPUT"] = SECRET
    yield
    del os.environ["EXPECTED_OUTPUT"]
    os.close(descriptor)
    os.unlink(path)


@pytest.mark.parametrize("attack", THEFTS.values(), ids=THEFTS)
def test_the_expected_output_cannot_be_stolen(grader: CodeGrader, scattered_secret: None, attack: str) -> None:
    tests = json.dumps([{"input": "", "output": SECRET, "type": "stdin"}])
    assert not grade_in_time(grader, LOOK + dedent(attack), tests).correct


def test_the_thieves_would_know_their_loot() -> None:
    namespace: dict[str, object] = {}
    with pytest.raises(SystemExit):
        exec(LOOK + f"look(['{SECRET}'])", namespace)


# Each defines f, which should return [3, 1, 2]; the results are compared outside.
FORGERIES = {
    "equal to everything": """
        class Same(list):
            __eq__ = lambda self, other: True
            __ne__ = lambda self, other: False
            __hash__ = None
        f = lambda: Same()""",
    "object equal to everything": "class Any:\n    __eq__ = lambda *_: True\nf = lambda: Any()",
    "string equal to everything": "class S(str):\n    __eq__ = lambda *_: True\nf = lambda: S('no')",
    "item that lies": "class N:\n    item = lambda self: self\n    __eq__ = lambda *_: True\nf = lambda: [N()]",
    "json that lies": """
        import json
        json.loads = json.load = json.dumps = lambda *a, **k: '[true, true, true]'
        json.JSONEncoder.encode = lambda *a: 'true'
        f = lambda: 0""",
    "exit before the result": "import os\nf = lambda: os._exit(0)",
    "exit at import": "sys.exit(0)",
    "exit handlers": "import atexit\natexit.register(lambda: print('[3, 1, 2]'))\nf = lambda: []",
    "printed result": "def f():\n    print('[3, 1, 2]', flush=True)\n    return None",
    "guesses on the channel": """
        import os
        def f():
            for guess in ("[1, 2, 3]", "[3, 1, 2]"):
                os.write(3, guess.encode())
            os._exit(0)""",
    "ready twice": "import os\ndef f():\n    os.write(3, b'\\n\\n')\n    return []",
    "closed channel": "import os\ndef f():\n    os.closerange(0, 64)\n    return [3, 1, 2]",
    "patched driver": """
        frame = sys._getframe()
        while frame:
            frame.f_globals["READY"] = b"passed"
            frame.f_globals["_plain"] = lambda value: [3, 1, 2]
            frame = frame.f_back
        f = lambda: True""",
    "not a number": "f = lambda: float('nan')",
    "nested without end": "def f():\n    a = []\n    a.append(a)\n    return a",
    "deep result": "import os\ndef f():\n    os.write(3, b'[' * 60000)\n    os._exit(0)",
    "big number": "import os\ndef f():\n    os.write(3, b'9' * 60000)\n    os._exit(0)",
    "garbage": "import os\ndef f():\n    os.write(3, bytes(range(256)) * 9)\n    os._exit(0)",
    "verdict on the channel": "import os\ndef f():\n    os.write(3, b'{\"correct\": true}')\n    os._exit(0)",
}


@pytest.mark.parametrize("attack", FORGERIES.values(), ids=FORGERIES)
def test_a_result_cannot_be_forged(grader: CodeGrader, attack: str) -> None:
    tests = json.dumps([{"input": "", "output": "[3, 1, 2]", "type": "functional", "fn_name": "f"}])
    assert not grade_in_time(grader, dedent(attack), tests).correct


def test_the_channel_is_reached_and_takes_no_second_guess() -> None:
    run = Sandbox(LIMITS).run(dedent(FORGERIES["guesses on the channel"]), "[]", 1000, "f")
    assert run.output == b"[1, 2, 3][3, 1, 2]"


# Each prints the right answer, 42, only after having had more than its share.
EXCESSES = {
    "endless loop": ("while True: pass", "timeout"),
    "endless loop in C": ("9 ** 999999999", "timeout"),
    "ignored signals": (
        "import signal\nfor n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n    except OSError: pass\n"
        "while True: pass",
        "timeout",
    ),
    "sleep": ("import time\ntime.sleep(1000)", "slept"),
    "sleep with stdout closed": ("import os, time\nos.close(1)\ntime.sleep(1000)", "slept"),
    "stopped": ("import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)", "slept"),
    "dripping output": ("import time\nwhile True:\n    print(end=' ', flush=True)\n    time.sleep(0.01)", "slept"),
    "memory": ("x = bytearray(2**30)", "failed"),
    "memory in small pieces": ("x = [bytes(100000) for _ in range(10**7)]", "failed"),
    "memory of an integer": ("x = 1 << 2**40", "failed"),
    "zip bomb": (
        "import zlib\nb = zlib.compress(bytes(2**24))\nx = [zlib.decompress(b) for _ in range(100)]",
        "failed",
    ),
    "regex bomb": ("import re\nre.match('(a+)+$', 'a' * 64 + 'b')", "timeout"),
    "output flood": ("while True: sys.stdout.write('4' * 65536)", "output_limit"),
    "error flood": ("while True: sys.stderr.write('4' * 65536)", "timeout"),
    "fork": ("import os\nos.fork()", "failed"),
    "fork bomb": (
        "import os\nwhile True:\n    try: os.fork()\n    except OSError as e: raise SystemError from e",
        "failed",
    ),
    "vfork and exec": ("import subprocess\nsubprocess.Popen(['/usr/bin/true'])", "failed"),
    "posix_spawn": ("import os\nos.posix_spawn(sys.executable, ['python'], {})", "failed"),
    "process pool": ("import multiprocessing\nmultiprocessing.Pool(2)", "failed"),
    "thread bomb": (
        "import threading, time\nthreading.stack_size(2**15)\n"
        "while True: threading.Thread(target=time.sleep, args=(1000,)).start()",
        "failed",
    ),
    "huge file": ("open('/tmp/x', 'wb').write(bytes(2**25))", "failed"),
    "full /tmp": ("for n in range(100): open(f'/tmp/{n}', 'wb').write(bytes(2**20))", "failed"),
    "many files": ("for n in range(10**9): open(f'/tmp/{n}', 'w').close()", "failed"),
    "many folders": ("import os\nfor n in range(10**9): os.mkdir(f'/tmp/{n}')", "failed"),
    "many descriptors": ("x = [open('/dev/null') for _ in range(10**4)]", "failed"),
    "deep recursion": ("def f(n): return f(n + 1) + 1\nf(0)", "failed"),
    "deep recursion in C": ("x = []\nfor _ in range(10**6): x = [x]\nrepr(x)", "failed"),
    "deep syntax": ("exec('(' * 10**5)", "failed"),
    "segmentation fault": ("import ctypes\nctypes.string_at(0)", "failed"),
    "abort": ("import os\nos.abort()", "failed"),
    "kill everybody": ("import os, signal\nos.kill(-1, signal.SIGKILL)", "failed"),
    "kill the parent": ("import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\nwhile True: pass", "timeout"),
    "end by SIGKILL": ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", "failed"),
    "higher limits": (
        "import resource\nfor n in range(16):\n    try: resource.setrlimit(n, (-1, -1))\n"
        "    except (OSError, ValueError): pass\nx = bytearray(2**30)",
        "failed",
    ),
    "exec of the interpreter": (
        "import os\nos.execv(sys.executable, [sys.executable, '-c', 'while True: pass'])",
        "timeout",
    ),
}


@pytest.fixture(scope="module")
def excess_verdicts() -> dict[str, CodeVerdict]:
    """The verdicts of all, graded side by side, each with a good program next to it that must pass."""
    good = respond("print(int(input()) * 2)")
    attacks = [respond(f"{attack}\nprint(int(input()) * 2)") for attack, _ in EXCESSES.values()]
    start = time.monotonic()
    with CodeGrader(num_workers=4, limits=LIMITS) as grader:
        verdicts = grade_code(grader, attacks, [DOUBLE] * len(attacks))
        assert grade_code(grader, [good], [DOUBLE])[0].correct
    assert time.monotonic() - start < MOST_SECONDS_TOGETHER
    return dict(zip(EXCESSES, verdicts, strict=True))


@pytest.mark.parametrize("name", EXCESSES)
def test_no_more_than_its_share(excess_verdicts: dict[str, CodeVerdict], name: str) -> None:
    verdict, error = excess_verdicts[name], EXCESSES[name][1]
    assert not verdict.correct
    assert verdict.num_passed == 0
    # What takes all of its time may reach its limit before another.
    assert verdict.error_kind in (error, "timeout")


def test_a_moderate_share_is_enough(grader: CodeGrader) -> None:
    """The programs above fail by their excess alone: the same in small pass."""
    moderate = [
        "x = bytearray(2**20)",
        "import threading\nthreading.stack_size(2**26)\nthreading.Thread(target=len, args=('',)).start()",
        "open('/tmp/x', 'wb').write(bytes(2**20))",
        "def f(n): return n and f(n - 1)\nf(20000)",
        "sys.stderr.write('4' * 2**20)",
        "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)",
        "import numpy",
    ]
    programs = [respond(f"{program}\nprint(int(input()) * 2)") for program in moderate]
    verdicts = grade_code(grader, programs, [DOUBLE] * len(programs))
    assert [verdict.error_kind for verdict in verdicts] == [None] * len(moderate)


@pytest.mark.parametrize(
    "program", ["\0", "\ud800", "print('\u202e')", "# -*- coding: utf-7 -*-\n+AGE-", "x = '\U0010ffff'"]
)
def test_odd_text_is_no_answer(grader: CodeGrader, program: str) -> None:
    assert not grade_in_time(grader, program, DOUBLE).correct


def test_the_driver_is_as_it_was() -> None:
    """After all of the above the grader's own files are there, and no bytecode of a program's is beside them."""
    assert Path(code_driver.__file__).read_text().startswith('"""The first thing that runs in the sandbox')
    assert not [path for path in Path(code_driver.__file__).parent.rglob("*solution*")]
