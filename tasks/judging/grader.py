"""Symbolic comparison by math-verify, in worker processes that are killed when they take too long.

A worker compares two answers, or finds the answer in a whole response and compares that.

math-verify guards itself with SIGALRM, which cannot interrupt one big-integer operation (Math-Verify issue 65),
fails off the main thread and goes by the clock. Here a worker is a fresh interpreter (math_worker.py); requests and
verdicts are lines of JSON on its stdin and stdout. The limit is processor time, enforced by the kernel, so that a busy
machine does not turn right answers wrong. A worker that is found asleep, or dies of anything else, is replaced and its
task tried once more.
"""

import json
import math
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from tasks.judging import math_worker
from tasks.judging.math_worker import MEMORY_BYTES, Kind, Pair, Reply
from tasks.judging.watch import Watch

# Importing sympy takes seconds, and much longer on a busy machine.
STARTUP_SECONDS = 120.0
# Time that a comparison may sleep, and take where the kernel does not tell sleep, as multiples of its processor time.
SLEEP_FACTOR, UNKNOWN_FACTOR = 4, 20
# How often a comparison is looked at.
_LOOK_SECONDS = 0.5

Request = tuple[Kind, Sequence[Pair]]
"""Texts of one kind that are looked at within one limit."""


class _Worker:
    """One interpreter; `task` is the index it works on."""

    def __init__(self, cpu_seconds: float) -> None:
        self.cpu_seconds = cpu_seconds
        command = [sys.executable, "-P", math_worker.__file__, str(os.getpid()), str(cpu_seconds)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
        )
        os.set_blocking(self.stdin_fd, False)  # a response is longer than the pipe's buffer
        self.unsent = b""
        self.received = b""
        self.ready = False
        self.task: int | None = None
        self.watch: Watch | None = None
        self._start, self._lost = time.monotonic(), False

    def remaining(self) -> float:
        """Seconds until it is given up, unless it works on."""
        if self._lost:
            return 0.0
        if not self.ready:
            return STARTUP_SECONDS - (time.monotonic() - self._start)
        return math.inf if self.watch is None else self.watch.remaining()

    @property
    def stdin_fd(self) -> int:
        return self.process.stdin.fileno()  # type: ignore[union-attr]

    def send(self, task: int, request: Request) -> None:
        """Start on a task."""
        self.task = task
        self.watch = Watch(self.process.pid, SLEEP_FACTOR * self.cpu_seconds, UNKNOWN_FACTOR * self.cpu_seconds)
        self.unsent = (json.dumps(request) + "\n").encode()
        self.flush()

    def flush(self) -> None:
        """Hand over as much of the request as the worker takes at once."""
        try:
            self.unsent = self.unsent[os.write(self.stdin_fd, self.unsent) :]
        except BlockingIOError:
            pass
        except BrokenPipeError:
            self.unsent, self._lost = b"", True  # it has died: given up at once

    def receive(self) -> Any:
        """The next message, None if it is not complete yet; EOFError if the worker has died."""
        chunk = os.read(self.fileno(), 4096)
        if not chunk:
            raise EOFError
        self.received += chunk
        line, newline, rest = self.received.partition(b"\n")
        if not newline:
            return None
        self.received = rest
        return json.loads(line)

    def fileno(self) -> int:
        return self.process.stdout.fileno()  # type: ignore[union-attr]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            pipe.close()  # type: ignore[union-attr]


class VerifierPool:
    """Long-lived workers that decide whether LaTeX answers are equal. Safe to use from any thread."""

    def __init__(self, num_workers: int, cpu_seconds: float) -> None:
        if num_workers < 1 or cpu_seconds <= 0:
            raise ValueError("a verifier pool needs at least one worker and a positive time limit")
        self.num_workers = num_workers
        self.cpu_seconds = cpu_seconds
        self._workers: list[_Worker] = []
        self._lock = threading.Lock()

    def verify(self, pairs: Sequence[Pair]) -> list[bool | None]:
        """For each (gold, answer) whether they are equal; None where the worker took too long or crashed."""
        return [None if replies is None else replies[0] for replies in self.verify_together([[pair] for pair in pairs])]

    def verify_together(self, groups: Sequence[Sequence[Pair]]) -> list[list[bool] | None]:
        """As `verify`, with one limit for all pairs of a group."""
        found = self._run([("answer", group) for group in groups])
        return [None if replies is None else [equal for equal, _ in replies] for replies in found]

    def run(self, requests: Sequence[tuple[Kind, str, str]]) -> list[Reply | None]:
        """A reply to each (kind, gold, text); None where the worker took too long or crashed."""
        found = self._run([(kind, [(gold, text)]) for kind, gold, text in requests])
        return [None if replies is None else replies[0] for replies in found]

    def _run(self, requests: Sequence[Request]) -> list[list[Reply] | None]:
        replies: list[list[Reply] | None] = [None] * len(requests)
        with self._lock:
            pending, retried = deque(range(len(requests))), set[int]()
            while pending or any(worker.task is not None for worker in self._workers):
                self._assign(requests, pending)
                lost = [worker for worker in self._wait() if not self._collect(worker, replies)]
                lost += [worker for worker in self._workers if worker not in lost and worker.remaining() <= 0]
                for worker in lost:
                    if self._give_up(worker) and worker.task is not None and worker.task not in retried:
                        retried.add(worker.task)
                        pending.append(worker.task)
        return replies

    def _assign(self, requests: Sequence[Request], pending: deque[int]) -> None:
        for worker in [w for w in self._workers if w.task is None and w.process.poll() is not None]:
            self._give_up(worker)
        num_starting = sum(not worker.ready for worker in self._workers)
        while len(self._workers) < self.num_workers and num_starting < len(pending):
            self._workers.append(_Worker(self.cpu_seconds))
            num_starting += 1
        for worker in self._workers:
            if pending and worker.ready and worker.task is None:
                task = pending.popleft()
                worker.send(task, requests[task])

    def _wait(self) -> list[_Worker]:
        """Workers that have something to say, at the latest when the first deadline passes."""
        busy = [worker for worker in self._workers if worker.task is not None or not worker.ready]
        with selectors.DefaultSelector() as selector:
            for worker in busy:
                selector.register(worker, selectors.EVENT_READ, worker)
                if worker.unsent:
                    selector.register(worker.stdin_fd, selectors.EVENT_WRITE, worker)
            timeout = min(_LOOK_SECONDS, *(worker.remaining() for worker in busy))
            events = selector.select(max(timeout, 0))
        for key, _ in events:
            if key.events == selectors.EVENT_WRITE:
                key.data.flush()
        return [key.data for key, _ in events if key.events == selectors.EVENT_READ]

    def _collect(self, worker: _Worker, replies: list[list[Reply] | None]) -> bool:
        """Take what a worker says; False for one that has died."""
        try:
            message = worker.receive()
        except EOFError:
            return False
        if message is None:
            return True
        if worker.task is None:
            worker.ready = True
        else:
            replies[worker.task] = [tuple(reply) for reply in message]
            worker.task = worker.watch = None
        return True

    def _give_up(self, worker: _Worker) -> bool:
        """Kill a worker; a new one is started when needed. Whether anything else than its task may be to blame."""
        self._workers.remove(worker)
        worker.kill()
        if not worker.ready:
            raise RuntimeError(
                "a math-verify worker did not start; check that `python -c 'import math_verify'` works with "
                f"{sys.executable} within {STARTUP_SECONDS:.0f} s and {MEMORY_BYTES >> 30} GB of address space"
            )
        return worker.process.returncode != -signal.SIGXCPU

    def close(self) -> None:
        """End the workers."""
        with self._lock:
            for worker in self._workers:
                worker.kill()
            self._workers.clear()
