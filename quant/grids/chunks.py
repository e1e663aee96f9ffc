"""Runs of rows small enough for what a pass computes from them to stay in a CPU core's cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch

CHUNK_BYTES_CPU = 2**19
CHUNK_BYTES_ACCELERATOR = 2**30


def row_chunks(num_rows: int, row_bytes: int, device: torch.device) -> Iterator[slice]:
    """Slices of at least one row each, in order; `row_bytes` is the size of one temporary's row."""
    limit = CHUNK_BYTES_CPU if device.type == "cpu" else CHUNK_BYTES_ACCELERATOR
    step = max(1, limit // max(1, row_bytes))
    return (slice(start, start + step) for start in range(0, num_rows, step))
