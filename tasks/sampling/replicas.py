"""Data parallelism: replicas of an engine, each in a process of its own on its own devices, share the requests."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tasks.runtime.stage import StageError
from tasks.sampling.engine import (
    Completion,
    EngineOptions,
    OnFinished,
    OnTokens,
    Request,
    SamplingParams,
    TokenPair,
    check_lengths,
)
from tasks.sampling.loglikelihood import check_pairs
from tasks.sampling.registry import ENGINES
from tasks.sampling.replica_process import Chunk, Replica, ReplicaFailure, Result, Tokens

CHUNKS_PER_REPLICA = 4
"""Of a call with more items than all batches hold: the last chunk keeps the others waiting for a quarter at most."""
DEVICES_VARIABLE = "CUDA_VISIBLE_DEVICES"

Take = Callable[[Result | Tokens], None]


class ReplicatedEngine:
    """An `Engine` for evaluation: its weights are the checkpoint's and stay so.

    In float32 a completion is that of a single engine; in less, what else is in its batch may change it.
    An exception that leaves a method ends every replica; what they had finished has been reported before.

    Args:
        name: engine of the replicas.
        checkpoint: see `open_engine`.
        num_replicas: the first `num_replicas` x `tensor_parallel` visible devices are used; on a CPU the replicas
            share this process's threads.
        options: of each replica.

    Raises:
        StageError: before anything is started, when too few devices are visible; and, as every method, when a
            replica dies or raises a StageError.
        RuntimeError: as every method, when a replica raises anything else; its traceback is in the log.
    """

    def __init__(self, name: str, checkpoint: Path, num_replicas: int, options: EngineOptions) -> None:
        environments = _environments(name, num_replicas, options)
        self._limit, self._batch_size = options.max_model_len, options.batch_size
        self._replicas: list[Replica] = []
        with self._ending_all():
            for rank, environment in enumerate(environments, start=1):
                on_device = f" (device {environment[DEVICES_VARIABLE]})" if DEVICES_VARIABLE in environment else ""
                label = f"{name} replica {rank} of {num_replicas}{on_device}"
                self._replicas.append(Replica(label, environment, name, checkpoint, options))
            self._run((), lambda message: None)

    def generate(
        self,
        requests: Sequence[Request],
        sampling: SamplingParams,
        on_finished: OnFinished | None = None,
        on_tokens: OnTokens | None = None,
    ) -> list[Completion]:
        """See `Engine.generate`; `on_tokens` tells of tokens of any replica."""
        check_lengths(requests, self._limit)
        return self._answers(requests, sampling, on_finished, on_tokens)

    def loglikelihood(self, pairs: Sequence[TokenPair]) -> list[tuple[float, bool]]:
        """See `Engine.loglikelihood`; one token of the context limit is left free, as vLLM needs it."""
        check_pairs(pairs, self._limit - 1)
        return self._answers(pairs, None)

    def load_weights(self, model: nn.Module) -> None:
        """Raises ValueError: each replica would need them in its own process."""
        raise ValueError("replicas keep the weights of their checkpoint: use a single engine where weights change")

    def close(self) -> None:
        """Have every replica free its memory and end."""
        for replica in self._replicas:
            replica.stop()
        for replica in self._replicas:
            replica.join()
        self._replicas = []

    def _answers(
        self,
        items: Sequence[Any],
        sampling: SamplingParams | None,
        on_result: Callable[[int, Any], None] | None = None,
        on_tokens: OnTokens | None = None,
    ) -> list[Any]:
        if not self._replicas:
            raise RuntimeError("the replicas have ended: open another engine")
        size = chunk_size(len(items), len(self._replicas), self._batch_size)
        chunks = (Chunk(start, items[start : start + size], sampling) for start in range(0, len(items), size))
        answers: dict[int, Any] = {}

        def take(message: Result | Tokens) -> None:
            if isinstance(message, Result):
                answers[message.index] = message.value
                if on_result is not None:
                    on_result(message.index, message.value)
            elif on_tokens is not None:
                on_tokens()

        with self._ending_all():
            self._run(chunks, take)
        return [answers[index] for index in range(len(items))]

    def _run(self, chunks: Iterable[Chunk], take: Take) -> None:
        """Give each idle replica the next chunk, until none is left and all are idle."""
        waiting = deque(chunks)
        try:
            while True:
                for replica in self._replicas:
                    if waiting and not replica.busy:
                        replica.send(waiting.popleft())
                busy = {replica.connection: replica for replica in self._replicas if replica.busy}
                if not busy:
                    return
                for connection in wait(list(busy)):
                    if (message := busy[connection].receive()) is not None:  # type: ignore[index]  # one of these
                        take(message)
        except ReplicaFailure as failure:
            self._take_last(take)
            raise failure.error from None

    def _take_last(self, take: Take) -> None:
        """End all replicas and take what they had said before."""
        for replica in self._replicas:
            replica.kill()
        for replica in self._replicas:
            for message in replica.unread():
                take(message)

    @contextmanager
    def _ending_all(self) -> Iterator[None]:
        """An exception (Ctrl-C, a stall, the journal's) leaves replicas at work that nobody waits for."""
        try:
            yield
        except BaseException:
            for replica in self._replicas:
                replica.kill()
            self.close()
            raise


def _environments(name: str, num_replicas: int, options: EngineOptions) -> list[dict[str, str]]:
    """The variables that each replica is started with: its threads and, on GPUs, its devices."""
    threads = {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // num_replicas))}
    if options.device == "cpu" and not (ENGINES[name].picks_device and torch.cuda.is_available()):
        return [threads] * num_replicas
    visible = visible_devices(os.environ.get(DEVICES_VARIABLE, ""), torch.cuda.device_count())
    return [
        {**threads, DEVICES_VARIABLE: group} for group in device_groups(visible, num_replicas, options.tensor_parallel)
    ]


def visible_devices(setting: str, count: int) -> list[str]:
    """Names of the `count` devices that CUDA finds under this CUDA_VISIBLE_DEVICES: indices, or UUIDs if it has them.

    CUDA ignores everything from the first entry that is no device.
    """
    named = [entry.strip() for entry in setting.split(",") if entry.strip()]
    return named[:count] or [str(index) for index in range(count)]


def device_groups(visible: Sequence[str], num_replicas: int, tensor_parallel: int) -> list[str]:
    """For each replica the next `tensor_parallel` devices, comma-separated.  StageError if there are too few."""
    needed = num_replicas * tensor_parallel
    if len(visible) < needed:
        raise StageError(
            f"data_parallel={num_replicas} x tensor_parallel={tensor_parallel} takes {needed} devices, and "
            f"{len(visible)} are visible: lower one of the two, or let {DEVICES_VARIABLE} show more"
        )
    return [",".join(visible[start : start + tensor_parallel]) for start in range(0, needed, tensor_parallel)]


def chunk_size(num_items: int, num_replicas: int, batch_size: int) -> int:
    """Items handed out together.

    An even share, if the batches of all replicas hold every item: more chunks would each wait for their longest
    response in half-empty batches.  Else a batch or more, so that a replica which is done early takes from the rest.
    """
    share = -(-num_items // num_replicas)
    return max(1, min(share, max(batch_size, -(-share // CHUNKS_PER_REPLICA))))
