"""Finished generations, written down one by one, so that a killed stage generates only the rest.

The journal is a JSON-lines file in the stage's scratch folder, which belongs to one stage key and hence to one
checkpoint.  Nothing in it is ever rewritten; each line ends with a checksum of itself, and one that does not verify is
passed over, told in the log, and its sample generated again.  Each line is keyed by everything else that a sample
depends on: prompt tokens, request seed, sampling parameters, and the engine with its version, dtype and device, so that
what another engine left there is not taken for its own.  A resumed run gives the same samples as an undisturbed one
only where an engine's samples do not depend on what else is in its batch: so in fp32, but not in bf16, whose rounding
depends on the batch; there whole batches have to be sampled together (sampler.Sampler.sample).
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from tasks.sampling.engine import Request, SamplingParams

logger = logging.getLogger(__name__)

FILE = "generations.jsonl"
CHECK = b', "check": "'
CHECK_DIGITS = 16
SYNC_SECONDS = 5.0
"""A kill of this process loses nothing; a crash of the machine loses at most what is younger than this."""


@dataclass(frozen=True)
class Generation:
    """One finished sample: token_ids include the stop token."""

    token_ids: tuple[int, ...]
    finish_reason: Literal["stop", "length"]
    mean_logprob: float | None
    """Mean log-probability of the tokens in nats; None where the engine cannot tell."""
    seconds: float
    """From the submission of the request to its end, in whichever run generated it."""

    def __post_init__(self) -> None:
        numbers = (self.seconds,) if self.mean_logprob is None else (self.seconds, self.mean_logprob)
        if not (
            all(type(token) is int for token in self.token_ids)
            and self.finish_reason in ("stop", "length")
            and all(isinstance(number, int | float) for number in numbers)
        ):
            raise ValueError("not a generation")


def request_key(request: Request, sampling: SamplingParams, engine: Mapping[str, str]) -> str:
    """Identity of a sample of one checkpoint; `engine` says what computes it (name, versions, dtype, device)."""
    content = {
        "prompt_ids": list(request.prompt_ids),
        "seed": request.seed,
        "sampling": asdict(sampling),
        "engine": dict(engine),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _line(key: str, generation: Generation) -> bytes:
    """{"key": ..., the generation's fields, "check": of all before it}."""
    row: dict[str, Any] = {"key": key, **asdict(generation)}
    body = json.dumps(row).encode().removesuffix(b"}")
    return body + CHECK + _checksum(body) + b'"}\n'


def _parse(line: bytes) -> tuple[str, Generation]:
    """ValueError, KeyError or TypeError for a line that is not as it was written, which is seen before it is read."""
    body, _, check = line.rpartition(CHECK)
    if check != _checksum(body) + b'"}':
        raise ValueError("the line is not what was written")
    row = json.loads(body + b"}")
    key = row.pop("key")
    return key, Generation(**{**row, "token_ids": tuple(row["token_ids"])})


def _checksum(body: bytes) -> bytes:
    return hashlib.sha256(body).hexdigest()[:CHECK_DIGITS].encode()


class Journal(AbstractContextManager["Journal"]):
    """Context manager over an append-only file of finished generations.

    A full disk raises OSError (ENOSPC or the like) out of `append` and leaves a file of whole lines.
    """

    def __init__(self, path: Path) -> None:
        self._finished: dict[str, Generation] = {}
        self._size = self._read(path)
        self._file = path.open("ab", buffering=0)  # nothing of a line that failed may be written later
        self._file.truncate(self._size)
        self._synced = time.monotonic()

    def _read(self, path: Path) -> int:
        """Load finished lines; returns how many bytes of the file are whole lines (a kill can cut the last one)."""
        if not path.exists():
            return 0
        content = path.read_bytes()
        whole_bytes = content.rfind(b"\n") + 1
        num_damaged = 0
        for line in content[:whole_bytes].split(b"\n")[:-1]:
            try:
                key, generation = _parse(line)
                self._finished[key] = generation
            except (ValueError, KeyError, TypeError):
                num_damaged += 1
        if num_damaged:
            logger.warning("%s holds %d damaged lines; their samples will be generated again", path, num_damaged)
        return whole_bytes

    def get(self, key: str) -> Generation | None:
        return self._finished.get(key)

    def append(self, key: str, generation: Generation) -> None:
        """Record one sample; it is with the operating system, hence safe from a kill of this process, on return."""
        line = _line(key, generation)
        written = self._file.write(line)
        if written != len(line):
            self._file.truncate(self._size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._file.name)
        self._size += len(line)
        self._finished[key] = generation
        if time.monotonic() - self._synced > SYNC_SECONDS:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._file.close()
