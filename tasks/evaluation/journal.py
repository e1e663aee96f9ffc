"""Finished generations, written down one by one, so that a killed evaluation generates only the rest.

The journal is a JSON-lines file in the stage's scratch folder, which belongs to one stage key and hence to one
checkpoint.  Each line is keyed by everything else that a sample depends on: prompt tokens, request seed and sampling
parameters.  A resumed run gives the same samples as an undisturbed one only where an engine's samples do not depend on
what else is in its batch: so in fp32, but not in bf16, whose rounding depends on the batch.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal

from tasks.rollout.engine import Request, SamplingParams

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Generation:
    """One finished sample: token_ids include the stop token."""

    token_ids: tuple[int, ...]
    finish_reason: Literal["stop", "length"]


def request_key(request: Request, sampling: SamplingParams) -> str:
    """Identity of a sample of one checkpoint."""
    content = {"prompt_ids": list(request.prompt_ids), "seed": request.seed, "sampling": asdict(sampling)}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class Journal:
    """Context manager over an append-only file of finished generations."""

    def __init__(self, path: Path) -> None:
        self._finished: dict[str, Generation] = {}
        whole_bytes = self._read(path)
        self._file = path.open("ab")
        self._file.truncate(whole_bytes)

    def _read(self, path: Path) -> int:
        """Load finished lines; returns how many bytes of the file are whole lines (a kill can cut the last one)."""
        if not path.exists():
            return 0
        content = path.read_bytes()
        whole_bytes = content.rfind(b"\n") + 1
        for line in content[:whole_bytes].splitlines():
            try:
                row = json.loads(line)
                self._finished[row["key"]] = Generation(tuple(row["token_ids"]), row["finish_reason"])
            except (ValueError, KeyError, TypeError):
                logger.warning("%s holds a damaged line; its sample will be generated again", path)
        return whole_bytes

    def __len__(self) -> int:
        return len(self._finished)

    def get(self, key: str) -> Generation | None:
        return self._finished.get(key)

    def append(self, key: str, generation: Generation) -> None:
        """Record one sample; it is with the operating system, hence safe from a kill of this process, on return."""
        row = {"key": key, "token_ids": list(generation.token_ids), "finish_reason": generation.finish_reason}
        self._file.write(json.dumps(row).encode() + b"\n")
        self._file.flush()
        self._finished[key] = generation

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
