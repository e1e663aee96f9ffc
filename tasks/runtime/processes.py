"""How processes end: workers with their parent, stages and runs within seconds when they are asked to.

Shared by the command line, stages' workers and the replicas of an engine.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from types import FrameType


class Terminated(KeyboardInterrupt):
    """SIGTERM has arrived: a run ends as it does for Ctrl-C."""


@contextlib.contextmanager
def raising_terminated() -> Iterator[None]:
    """Inside, SIGTERM raises `Terminated` in the main thread; a second one kills, whatever the first is waiting for."""

    def handle(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise Terminated

    with _handling_sigterm(handle):
        yield


@contextlib.contextmanager
def stop_requested() -> Iterator[Callable[[], bool]]:
    """For a stage that can save its state between two steps: inside, SIGTERM only makes the yielded function true.

    Who sent it waits a few seconds before it kills (`StageExecutor.kill`).
    """
    requested = threading.Event()
    with _handling_sigterm(lambda number, frame: requested.set()):
        yield requested.is_set


@contextlib.contextmanager
def _handling_sigterm(handle: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Python lets the main thread alone set handlers; in another nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def lead_group() -> None:
    """Make this worker the leader of a group, by which all that it starts can be ended with it."""
    os.setpgid(0, 0)


def end_group(leader: int | None) -> None:
    """Kill what a worker that has ended, or is about to, had started."""
    if leader is not None:
        with contextlib.suppress(ProcessLookupError):  # no such group: it had not come to `lead_group`, or all ended
            os.killpg(leader, signal.SIGKILL)


def follow_parent() -> None:
    """In a worker process of `multiprocessing`: leave Ctrl-C to the parent, and end when it ends, however it does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


@contextlib.contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Inside, these variables are set, for what is started there: a library reads its own when it is imported."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
