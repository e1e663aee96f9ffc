"""An engine that hangs is told apart from one that is slow: it gives no tokens.

An engine may hang in Python (a scheduler that never finds room for a request), in a system call or in a kernel.  So a
thread watches; a signal ends the first two with a StageError, and for the third, which no exception reaches, the
process ends itself.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType

from tasks.runtime.stage import StageError

logger = logging.getLogger(__name__)

POLL_SECONDS = 10.0
GRACE_SECONDS = 60.0
"""What the signal may take to be noticed before the process is ended."""
SIGNAL = signal.SIGUSR1
EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: the same command may succeed


class Watchdog:
    """Context manager around a call of an engine; must be entered in the main thread, which the signal goes to.

    Args:
        report_seconds: silence after which `on_stall` is called, and again at every look as long as it lasts.
        limit_seconds: silence after which the block is left with a StageError.
        unfinished: names the requests that are not finished, for the message.
        on_stall: takes the message; it is called in another thread.
    """

    def __init__(
        self,
        report_seconds: float,
        limit_seconds: float,
        unfinished: Callable[[], str],
        on_stall: Callable[[str], None],
    ) -> None:
        self._report_seconds = report_seconds
        self._limit_seconds = limit_seconds
        self._unfinished = unfinished
        self._on_stall = on_stall
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def alive(self) -> None:
        """The engine has given new tokens."""
        self._last = time.monotonic()

    def __enter__(self) -> Watchdog:
        self.alive()
        self._previous_handler = signal.signal(SIGNAL, self._raise)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        signal.signal(SIGNAL, self._previous_handler)

    def _watch(self) -> None:
        reported = interrupted = False
        while not self._ended.wait(min(POLL_SECONDS, self._report_seconds / 4)):
            silence = time.monotonic() - self._last
            if silence < self._report_seconds:
                reported = interrupted = False
                continue
            if not reported:
                logger.warning(self._message(silence))
                reported = True
            with contextlib.suppress(OSError):  # a full disk must not end the watch
                self._on_stall(self._message(silence))
            if silence >= self._limit_seconds and not interrupted:
                self._interrupt()
                interrupted = True
            if silence >= self._limit_seconds + GRACE_SECONDS:
                self._end_process(silence)

    def _interrupt(self) -> None:
        faulthandler.dump_traceback()  # into the log: where each thread hangs
        main = threading.main_thread().ident
        assert main is not None, "the main thread has started"
        signal.pthread_kill(main, SIGNAL)

    def _end_process(self, silence: float) -> None:
        print(f"{self._message(silence)}; it cannot be interrupted, so the process ends", file=sys.stderr, flush=True)
        os._exit(EXIT_CODE)

    def _message(self, silence: float) -> str:
        return f"the engine has given no token for {silence:.0f} s; not finished: {self._unfinished()}"

    def _raise(self, number: int, frame: FrameType | None) -> None:
        """Signal handler: leave the block, unless tokens have come at the last moment or it is being left."""
        silence = time.monotonic() - self._last
        if silence >= self._limit_seconds and not self._ended.is_set():
            raise StageError(
                f"{self._message(silence)}. What was finished is kept: run the same command again. If the engine is "
                f"slow, not stuck, raise generation.stall_limit_seconds (now {self._limit_seconds:g}) too"
            )
