"""Time asleep is told from time that others had the processor; a busy machine turns nothing right into wrong."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tasks.judging.code_answer import CodeGrader
from tasks.judging.gate import Gate
from tasks.judging.sandbox import Limits, Sandbox, why_unavailable
from tasks.judging.watch import Watch
from tests.tasks.judging.responses import grade_code

LOOP = "while True: pass"


@contextmanager
def on_one_busy_processor(others: int) -> Iterator[None]:
    """All that starts within shares one processor with so many others that never rest."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    # Each in a session of its own, as some kernels share processors among sessions.
    busy = [subprocess.Popen([sys.executable, "-c", LOOP], start_new_session=True) for _ in range(others)]
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)
        for process in busy:
            process.kill()
            process.wait()


@contextmanager
def running(program: str) -> Iterator[int]:
    process = subprocess.Popen([sys.executable, "-c", program])
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait()


def test_waiting_for_a_processor_is_no_sleep() -> None:
    with on_one_busy_processor(others=3), running(LOOP) as pid:
        time.sleep(0.5)
        watch = Watch(pid, asleep=10, unknown=10)
        time.sleep(2)
        assert watch.elapsed() > 2 and watch.remaining() > 9


def test_sleep_is() -> None:
    with running("import time\ntime.sleep(60)") as pid:
        watch = Watch(pid, asleep=10, unknown=20)
        time.sleep(1.5)
        assert watch.remaining() < 19


def test_where_the_kernel_does_not_say_the_clock_decides_later() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()  # nothing is known of it
    watch = Watch(process.pid, asleep=10, unknown=20)
    assert 19 < watch.remaining() <= 20


@pytest.mark.slow
@pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))
def test_a_busy_machine_turns_no_right_program_wrong() -> None:
    """It gets a thirteenth of a processor: its 0.6 s take longer than four times its limit of 1 s."""
    tests = json.dumps([{"input": "21", "output": "42", "type": "stdin"}])
    program = "import time\nwhile time.process_time() < 0.6: pass\nprint(int(input()) * 2)"
    start = time.monotonic()
    with on_one_busy_processor(others=12), CodeGrader(limits=Limits(cpu_seconds=1)) as grader:
        (verdict,) = grade_code(grader, [f"</think>\n```python\n{program}\n```"], [tests])
    assert time.monotonic() - start > 4
    assert verdict.correct and not verdict.timed_out


@pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))
def test_who_sleeps_is_tried_again_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first time something held it up; alone it is right."""
    box = Sandbox(Limits(cpu_seconds=1))
    ends = iter(["slept", "exited"])
    monkeypatch.setattr("tasks.judging.sandbox._isolated", lambda *_: type("R", (), {"end": next(ends)})())
    assert box.run("", "", 10).end == "exited"


def test_one_alone_and_others_beside_each_other() -> None:
    gate, seen, running = Gate(), [], [0, 0]
    most = [0]

    def beside() -> None:
        with gate.beside_others():
            running[0] += 1
            most[0] = max(most[0], running[0])
            seen.append(running[1])
            time.sleep(0.02)
            running[0] -= 1

    def alone() -> None:
        with gate.alone():
            running[1] += 1
            seen.append(running[0])
            time.sleep(0.02)
            running[1] -= 1

    threads = [threading.Thread(target=alone if i % 4 == 3 else beside) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert set(seen) == {0} and len(seen) == 16 and most[0] > 1
