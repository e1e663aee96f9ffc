"""Hadamard matrices of every order that the target models need.

Orders with an odd part come from the table that vllm-project/compressed-tensors ships (transform/utils/
hadamards.safetensors: unnormalised +-1 matrices of N. J. A. Sloane's library); the rest is Sylvester's doubling.
"""

from __future__ import annotations

import math
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

# Above this a factor is split further, so that a transform costs two small matrix products instead of a large one.
LARGEST_FACTOR = 256


def hadamard_factors(size: int) -> tuple[Tensor, Tensor]:
    """(left_AA, right_BB) with A * B = size, whose Kronecker product is an orthonormal Hadamard matrix, float64.

    Of the possible splits the one with the least A + B. Raises ValueError for a size without one.
    """
    splits = [
        (a, size // a)
        for a in range(1, size + 1)
        if size % a == 0 and max(a, size // a) <= LARGEST_FACTOR and is_known_order(a) and is_known_order(size // a)
    ]
    if not splits:
        raise ValueError(
            f"no Hadamard matrix of order {size} can be built from the known ones; use a method without online "
            "rotations for this model"
        )
    left, right = min(splits, key=sum)
    return _orthonormal(left), _orthonormal(right)


def hadamard_matrix(size: int) -> Tensor:
    """The orthonormal Hadamard matrix [size, size] of the factors, float64."""
    return torch.kron(*hadamard_factors(size))


def is_known_order(order: int) -> bool:
    """Whether `order` is that of a known matrix, or of one doubled."""
    return _doublings(order) is not None


def _doublings(order: int) -> int | None:
    """How often a matrix of the table is doubled to reach `order`; None if it cannot be reached."""
    known, count = _table_orders(), 0
    while order not in known:
        if order % 2:
            return None
        order, count = order // 2, count + 1
    return count


def _orthonormal(order: int) -> Tensor:
    count = _doublings(order)
    assert count is not None, "hadamard_factors asks for known orders only"
    matrix = _table_matrix(order >> count)
    for _ in range(count):
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
    return matrix / math.sqrt(order)


def _table() -> Path:
    spec = find_spec("compressed_tensors")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("Hadamard matrices come from compressed-tensors: pip install compressed-tensors")
    return Path(spec.submodule_search_locations[0]) / "transform" / "utils" / "hadamards.safetensors"


@lru_cache(maxsize=1)
def _table_orders() -> frozenset[int]:
    with safe_open(_table(), framework="pt") as file:
        return frozenset(map(int, file.keys()))


def _table_matrix(order: int) -> Tensor:
    with safe_open(_table(), framework="pt") as file:
        return file.get_tensor(str(order)).double()
