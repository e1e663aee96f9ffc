"""Engines that really hang: in Python, in a system call, and where no exception reaches them."""

import subprocess
import sys
import threading
import time

import pytest

from tasks.runtime.stage import StageError
from tasks.sampling import watchdog
from tasks.sampling.watchdog import SIGNAL, Watchdog


def spin() -> None:
    while True:
        pass


HANGS = {"in Python": spin, "in a system call": lambda: time.sleep(60), "on a lock": threading.Event().wait}


@pytest.mark.parametrize("hang", HANGS.values(), ids=HANGS)
def test_a_hanging_engine_is_reported_and_then_left(hang, capfd):
    reports = []
    start = time.monotonic()
    with pytest.raises(StageError) as caught, Watchdog(0.2, 0.6, lambda: "2 samples (problems a, b)", reports.append):
        hang()
    assert 0.6 <= time.monotonic() - start < 10
    assert reports and all("2 samples (problems a, b)" in report for report in reports)
    for part in (
        "no token for",
        "problems a, b",
        "What was finished is kept",
        "generation.stall_limit_seconds (now 0.6)",
    ):
        assert part in str(caught.value)
    assert "test_watchdog.py" in capfd.readouterr().err, "the log says where it hung"


def test_tokens_keep_it_quiet_and_a_short_stall_is_only_reported():
    reports = []
    with Watchdog(0.3, 5.0, lambda: "x", reports.append) as dog:
        for _ in range(10):
            time.sleep(0.1)
            dog.alive()
        assert not reports
        time.sleep(0.8)
        assert reports
        dog.alive()
        time.sleep(0.1)  # a look that was under way
        reports.clear()
        time.sleep(0.15)
        assert not reports, "it goes on"


def test_a_report_that_cannot_be_written_does_not_end_the_watch():
    def full(message):
        raise OSError(28, "No space left on device")

    with pytest.raises(StageError), Watchdog(0.1, 0.3, lambda: "x", full):
        spin()


def test_the_signal_handler_and_the_thread_are_gone_afterwards():
    import signal

    before = signal.getsignal(SIGNAL)
    with Watchdog(10, 20, lambda: "", print):
        assert signal.getsignal(SIGNAL) is not before
    assert signal.getsignal(SIGNAL) is before
    assert not [thread for thread in threading.enumerate() if thread.name == "watchdog"]


STUBBORN = """
import signal
from tasks.sampling import watchdog

watchdog.GRACE_SECONDS = 0.5
with watchdog.Watchdog(0.1, 0.3, lambda: "1 sample (problem a)", lambda message: None):
    signal.pthread_sigmask(signal.SIG_BLOCK, [watchdog.SIGNAL])  # as deaf as a kernel that hangs
    while True:
        pass
"""


def test_an_engine_that_no_exception_reaches_ends_its_process():
    done = subprocess.run([sys.executable, "-c", STUBBORN], capture_output=True, text=True, timeout=60)
    assert done.returncode == watchdog.EXIT_CODE
    assert "1 sample (problem a); it cannot be interrupted" in done.stderr
