"""Symbolic comparison by math-verify, in worker processes that are killed when they take too long.

A worker compares two answers, or finds the answer in a whole response and compares that.

math-verify guards itself with SIGALRM, which cannot interrupt one big-integer operation (Math-Verify issue 65)
and fails off the main thread. Here a worker is a fresh interpreter running this very file, which needs the
standard library and math-verify only; requests and verdicts are lines of JSON on its stdin and stdout.
The limit is processor time, enforced by the kernel, so that a busy machine does not turn right answers wrong;
the parent kills a worker at a multiple of it in wall time.
"""

import json
import math
import os
import select
import selectors
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, Literal

# Importing sympy takes seconds, and much longer on a busy machine.
STARTUP_SECONDS = 120.0
# Address space of a worker; sympy itself needs about 0.3 GB of it.
MEMORY_BYTES = 2 * 2**30
# Wall time of a comparison, as a multiple of its processor time.
WALL_FACTOR = 4
# How often an idle worker looks whether its parent still lives.
PARENT_CHECK_SECONDS = 2.0
# Most characters of an extracted answer that a worker hands back.
MAX_EXTRACTED_CHARS = 1000

Kind = Literal["answer", "statement", "response"]
"""An answer; a text that may state one ("the answer is ..."); a response that is searched for anything like one."""
Pair = tuple[str, str]
"""(reference answer, text)."""
Request = tuple[Kind, Sequence[Pair]]
"""Texts of one kind that are looked at within one limit."""
Reply = tuple[bool, str | None]
"""Whether the answer in the text is the reference, and that answer."""


class _Worker:
    """One interpreter; `task` is the index it works on and `deadline` when it is given up (time.monotonic)."""

    def __init__(self, cpu_seconds: float) -> None:
        self.wall_seconds = WALL_FACTOR * cpu_seconds
        command = [sys.executable, "-P", __file__, str(os.getpid()), str(cpu_seconds)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
        )
        os.set_blocking(self.stdin_fd, False)  # a response is longer than the pipe's buffer
        self.unsent = b""
        self.received = b""
        self.ready = False
        self.task: int | None = None
        self.deadline = time.monotonic() + STARTUP_SECONDS

    @property
    def stdin_fd(self) -> int:
        return self.process.stdin.fileno()  # type: ignore[union-attr]

    def send(self, task: int, request: Request) -> None:
        """Start on a task."""
        self.task = task
        self.deadline = time.monotonic() + self.wall_seconds
        self.unsent = (json.dumps(request) + "\n").encode()
        self.flush()

    def flush(self) -> None:
        """Hand over as much of the request as the worker takes at once."""
        try:
            self.unsent = self.unsent[os.write(self.stdin_fd, self.unsent) :]
        except BlockingIOError:
            pass
        except BrokenPipeError:
            self.unsent, self.deadline = b"", 0.0  # it has died: given up at once

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
            pending = deque(range(len(requests)))
            while pending or any(worker.task is not None for worker in self._workers):
                self._assign(requests, pending)
                for worker in self._wait():
                    self._collect(worker, replies)
                for worker in [w for w in self._workers if time.monotonic() > w.deadline]:
                    self._give_up(worker)
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
            timeout = min(worker.deadline for worker in busy) - time.monotonic()
            events = selector.select(max(timeout, 0))
        for key, _ in events:
            if key.events == selectors.EVENT_WRITE:
                key.data.flush()
        return [key.data for key, _ in events if key.events == selectors.EVENT_READ]

    def _collect(self, worker: _Worker, replies: list[list[Reply] | None]) -> None:
        try:
            message = worker.receive()
        except EOFError:
            self._give_up(worker)
            return
        if message is None:
            return
        if worker.task is None:
            worker.ready = True
        else:
            replies[worker.task] = [tuple(reply) for reply in message]
            worker.task = None
        worker.deadline = math.inf

    def _give_up(self, worker: _Worker) -> None:
        """Kill a worker, leaving its task without a verdict; a new one is started when needed."""
        self._workers.remove(worker)
        worker.kill()
        if not worker.ready:
            raise RuntimeError(
                "a math-verify worker did not start; check that `python -c 'import math_verify'` works with "
                f"{sys.executable} within {STARTUP_SECONDS:.0f} s and {MEMORY_BYTES >> 30} GB of address space"
            )

    def close(self) -> None:
        """End the workers."""
        with self._lock:
            for worker in self._workers:
                worker.kill()
            self._workers.clear()


def _serve(parent: int, cpu_seconds: float) -> None:
    """The worker's loop. It ends with its parent: by end of file, by a look at the parent's id while idle,
    and, when stuck in one long operation, by the limit on processor time."""
    import resource

    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # math-verify prints its parsing errors
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    # Our limits decide, so math-verify's own alarms must come later.
    alarm_seconds = math.ceil(WALL_FACTOR * cpu_seconds) + 1

    def expressions(kind: Kind, text: str) -> list[Any]:
        """What math-verify finds: a box before anything else, and in a response the last expression if need be."""
        last_resort = kind == "response"
        targets = [
            LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=last_resort),
            ExprExtractionConfig(try_extract_without_anchor=last_resort),
        ]
        found = f"\\boxed{{{text}}}" if kind == "answer" else text
        return parse(found, targets, parsing_timeout=alarm_seconds)

    def reply(kind: Kind, gold: str, text: str) -> Reply:
        found = expressions(kind, text)
        # Five decimals for whole responses, as in the paper's harness; else math-verify's own default.
        precision = 5 if kind == "response" else 6
        equal = verify(expressions("answer", gold), found, precision, timeout_seconds=alarm_seconds)
        extracted = next((str(part)[:MAX_EXTRACTED_CHARS] for part in found if isinstance(part, str)), None)
        return bool(equal), extracted

    def careful_reply(kind: Kind, gold: str, text: str) -> Reply:
        try:
            return reply(kind, gold, text)
        except Exception:
            return False, None  # what cannot be compared is not the answer

    # Builds the regular expressions and the grammar's tables, before any limit applies.
    warm = reply("answer", "\\frac{1}{2}", "0.5")
    replies.write(json.dumps(warm) + "\n")
    replies.flush()
    while True:
        while not select.select([0], [], [], PARENT_CHECK_SECONDS)[0]:
            if os.getppid() != parent:
                return
        line = sys.stdin.buffer.readline()
        if not line:
            return
        cpu_limit = math.ceil(time.process_time() + cpu_seconds)
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_limit, resource.RLIM_INFINITY))
        kind, pairs = json.loads(line)
        message = [careful_reply(kind, *pair) for pair in pairs]
        replies.write(json.dumps(message) + "\n")
        replies.flush()


if __name__ == "__main__":
    _serve(int(sys.argv[1]), float(sys.argv[2]))
