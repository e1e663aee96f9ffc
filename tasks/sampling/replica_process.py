"""One replica of tasks/sampling/replicas.py: the process with the engine, and its parent's handle on it.

They talk through a pipe of their own, which nothing that another replica does, or its death, can block.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tasks.runtime.processes import environment, follow_parent
from tasks.runtime.stage import StageError
from tasks.sampling.engine import Engine, EngineOptions, SamplingParams
from tasks.sampling.registry import open_engine

CLOSE_SECONDS = 30.0


@dataclass(frozen=True)
class Chunk:
    """To a replica: consecutive items of a call, the first at `start`; token pairs to be scored have no `sampling`."""

    start: int
    items: Sequence[Any]
    sampling: SamplingParams | None


@dataclass(frozen=True)
class Result:
    """From a replica: the answer to one item; `index` counts from the start of the call."""

    index: int
    value: Any


@dataclass(frozen=True)
class Tokens:
    """From a replica: new tokens have arrived."""


@dataclass(frozen=True)
class _Idle:
    """The engine is open, or a chunk finished."""


@dataclass(frozen=True)
class _Failed:
    """The engine has raised, and the replica ends; `mendable` if it was a StageError."""

    message: str
    mendable: bool


class ReplicaFailure(Exception):
    """A replica has died or raised; `error` is what the caller of the engine is to see."""

    def __init__(self, error: StageError | RuntimeError) -> None:
        super().__init__(str(error))
        self.error = error


class Replica:
    """The parent's end; `busy` from its start, and after every chunk, until the process says that it is idle.

    `connection` has something to be received when there is a message or the process has died.
    """

    def __init__(
        self, label: str, variables: Mapping[str, str], name: str, checkpoint: Path, options: EngineOptions
    ) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._label = label
        self.connection, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_serve, args=(theirs, name, checkpoint, options), name=label)
        with contextlib.closing(theirs), environment(variables):
            self._process.start()
        self.busy = True

    def send(self, chunk: Chunk) -> None:
        """Hand an idle replica its next chunk."""
        self.busy = True
        try:
            self.connection.send(chunk)
        except OSError:
            raise self._death() from None

    def receive(self) -> Result | Tokens | None:
        """Its next message, None if that is to be idle.  Raises ReplicaFailure."""
        try:
            message = self.connection.recv()
        except (EOFError, OSError):
            raise self._death() from None
        if isinstance(message, _Failed):
            text = f"{self._label} failed: {message.message}"
            raise ReplicaFailure(StageError(text) if message.mendable else RuntimeError(text))
        if isinstance(message, _Idle):
            self.busy = False
            return None
        return message

    def unread(self) -> Iterator[Result | Tokens]:
        """What a replica that has ended had still said."""
        with contextlib.suppress(ReplicaFailure):
            while True:
                message = self.receive()
                if message is not None:
                    yield message

    def _death(self) -> ReplicaFailure:
        self._process.join(CLOSE_SECONDS)
        return ReplicaFailure(
            StageError(
                f"{self._label} died with exit code {self._process.exitcode} (killed, or out of memory); its last "
                "words, if any, are in the log. What had been finished is kept: run the same command again, with a "
                "smaller batch_size if memory ran out."
            )
        )

    def kill(self) -> None:
        """End the process now, whatever it does; its messages can still be read."""
        self._process.kill()

    def stop(self) -> None:
        """Have an idle process close its engine and end."""
        with contextlib.suppress(OSError):  # it has ended already
            self.connection.send(None)

    def join(self) -> None:
        """Wait until a stopped or killed process has ended; one that cannot is killed."""
        self._process.join(CLOSE_SECONDS)
        self._process.kill()
        self._process.join()
        self.connection.close()


def _serve(connection: Connection, name: str, checkpoint: Path, options: EngineOptions) -> None:
    """The process: open the engine, then answer chunks until None comes."""
    follow_parent()
    try:
        with contextlib.closing(open_engine(name, checkpoint, options)) as engine:
            connection.send(_Idle())
            while (chunk := connection.recv()) is not None:
                _answer(engine, chunk, connection)
                connection.send(_Idle())
    except Exception as error:
        traceback.print_exc()  # into the log
        connection.send(_Failed(f"{type(error).__name__}: {error}", isinstance(error, StageError)))


def _answer(engine: Engine, chunk: Chunk, connection: Connection) -> None:
    def send_result(index: int, value: Any) -> None:
        connection.send(Result(chunk.start + index, value))

    if chunk.sampling is None:
        for index, score in enumerate(engine.loglikelihood(chunk.items)):
            send_result(index, score)
    else:
        engine.generate(chunk.items, chunk.sampling, send_result, lambda: connection.send(Tokens()))
