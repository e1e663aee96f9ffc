"""The one way in which a stage asks a model: an engine, watched, and a journal of what it has finished."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Protocol

from tasks.sampling.config import GenerationConfig
from tasks.sampling.engine import Completion, Engine, Request, SamplingParams
from tasks.sampling.journal import Generation, Journal, request_key
from tasks.sampling.watchdog import Watchdog

LOGPROB_DECIMALS = 4
"""Of a response's mean log-probability: what lies below is rounding, which depends on the batch."""
MOST_NAMED = 4
"""Unfinished problems that the report of a stall names,"""
MOST_NAME_CHARS = 16
"""and of each as many characters."""


class Progress(Protocol):
    """Takes how many samples of how many are there, and what else is to be told."""

    def __call__(self, done: int, total: int, **info: str) -> None: ...


class Tally:
    """Counts finished samples, and tells whoever watches of them and of stalls."""

    def __init__(self, total: int, progress: Progress, done: int = 0) -> None:
        self.done = done
        self._total, self._progress = total, progress

    def count(self) -> None:
        self.done += 1
        self._progress(self.done, self._total)

    def stalled(self, message: str) -> None:
        self._progress(self.done, self._total, stalled=message)


class Sampler:
    """Asks an engine, which it closes at its end, for completions under one way of picking tokens.

    Args:
        journal: where finished samples are kept and found again; None where they are never to be had twice, as in
            training, where each belongs to weights that pass.
        identity: what computes, see journal.request_key.
    """

    def __init__(
        self,
        engine: Engine,
        sampling: SamplingParams,
        config: GenerationConfig,
        journal: Journal | None = None,
        identity: Mapping[str, str] | None = None,
    ) -> None:
        self.engine, self.sampling = engine, sampling
        self._config, self._journal, self._identity = config, journal, identity or {}

    def complete(
        self,
        requests: Sequence[Request],
        names: Sequence[str],
        tally: Tally,
        on_finished: Callable[[int, Completion], None] = lambda index, completion: None,
    ) -> list[Completion]:
        """A completion of every request; `names` are those of their problems.

        Raises:
            StageError: the engine gave no token for too long.
        """
        unfinished = dict(enumerate(names))

        def finished(index: int, completion: Completion) -> None:
            on_finished(index, completion)
            del unfinished[index]

        with self.watched(unfinished.values(), tally) as watchdog:
            return self.engine.generate(requests, self.sampling, finished, watchdog.alive)

    def sample(
        self, requests: Sequence[Request], names: Sequence[str], tally: Tally, *, together: bool = False
    ) -> list[tuple[Generation, bool]]:
        """For every request its sample, and whether the journal had it; each is written there as it ends.

        With `together`, a request is asked again beside those that the journal lacks: in bfloat16 a sample depends on
        what else is in its batch, and so stays what it would have been.
        """
        assert self._journal is not None, "opened to keep what it samples"
        journal, start = self._journal, time.perf_counter()
        keys = [request_key(request, self.sampling, self._identity) for request in requests]
        known = {index: found for index, key in enumerate(keys) if (found := journal.get(key)) is not None}
        if together and len(known) < len(requests):
            known = {}
        for _ in known:
            tally.count()
        pending = [index for index in range(len(requests)) if index not in known]
        fresh: dict[int, Generation] = {}

        def finished(position: int, completion: Completion) -> None:
            index = pending[position]
            fresh[index] = _generation(completion, time.perf_counter() - start)
            journal.append(keys[index], fresh[index])
            tally.count()

        if pending:
            self.complete([requests[i] for i in pending], [names[i] for i in pending], tally, finished)
        if len(fresh) < len(pending):
            raise RuntimeError("the engine returned without reporting every completion as finished")
        return [(known[i], True) if i in known else (fresh[i], False) for i in range(len(requests))]

    @contextmanager
    def watched(self, unfinished: Collection[str], tally: Tally) -> Iterator[Watchdog]:
        """Around a call of the engine, which has to answer for the problems named in `unfinished` (a live view)."""

        def describe() -> str:
            names = [name[:MOST_NAME_CHARS] for name in islice(list(unfinished), MOST_NAMED)]
            names += ["..."] * (len(unfinished) > MOST_NAMED)
            return f"{len(unfinished)} samples (problems {', '.join(names)})"

        limits = self._config.stall_seconds, self._config.stall_limit_seconds
        with Watchdog(*limits, describe, tally.stalled) as watchdog:
            yield watchdog


def _generation(completion: Completion, seconds: float) -> Generation:
    mean = sum(completion.logprobs) / len(completion.logprobs)
    known = None if math.isnan(mean) else round(mean, LOGPROB_DECIMALS)
    return Generation(completion.token_ids, completion.finish_reason, known, round(seconds, 3))
