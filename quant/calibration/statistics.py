"""Input statistics of a linear layer: the GPTQ Hessian.

Dimensions: B sequences, T tokens, N tokens that count, I input features.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

TILE = 192
"""Edge of the tiles of the Hessian's upper triangle.  Only these are multiplied, which halves the work."""


@contextmanager
def exact_products(*, bfloat16_inputs: bool) -> Iterator[None]:
    """Multiply fp32 matrices without losing bits of the factors: TensorFloat-32 is off inside.

    Where every factor is a bfloat16 number stored as fp32, the CPU's bfloat16 units may be used: the factors convert
    without loss and the sums are still fp32, so this is the same product at twice the speed.
    """
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    cpu: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    cpu_precision = cpu.fp32_precision
    cpu.fp32_precision = "bf16" if bfloat16_inputs else "ieee"
    try:
        yield
    finally:
        cpu.fp32_precision = cpu_precision
        torch.set_float32_matmul_precision(precision)


def not_finite(dtype: torch.dtype) -> ValueError:
    """What is wrong when inputs of a layer are not finite though the weights, which were looked at, are."""
    if dtype is torch.float16:
        return ValueError(
            "the calibration inputs are not finite: activations overflow in float16; use bfloat16, that is set "
            '"dtype": "bfloat16" in the config.json of the model\'s folder'
        )
    return ValueError("the calibration inputs are not finite; check the checkpoint for outliers, or compute in float32")


class HessianAccumulator:
    """Mean over sequences of 2 X X^T in fp32 (GPTQ: IST-DASLab/gptq, gptq.py, `add_batch`).

    The mean is over sequences, not tokens, as there, scaled at the end: on a CPU a product with a new pair of scaling
    factors is a kernel compiled anew, which stays in memory (7 MB for each batch of 1536 features, measured).
    Only the tiles on and above the diagonal are summed; `hessian` mirrors them.
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        self.sum_II = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
        self.num_sequences = 0
        self.dtype = torch.float32
        """Of the inputs."""

    def add(self, x_BTI: Tensor, mask_BT: Tensor | None = None) -> None:
        """Take the inputs of a batch; tokens with a false mask (padding) do not count.

        Raises ValueError when an input is not finite.
        """
        x_NI = x_BTI.flatten(0, 1) if mask_BT is None else x_BTI[mask_BT.to(x_BTI.device, torch.bool)]
        self.dtype, is_bfloat16 = x_NI.dtype, x_NI.dtype is torch.bfloat16
        x_NI = x_NI.float()
        with exact_products(bfloat16_inputs=is_bfloat16):
            for start in range(0, x_NI.shape[1], TILE):
                tile = self.sum_II[start : start + TILE, start:]
                tile.addmm_(x_NI[:, start : start + TILE].T, x_NI[:, start:])
        self.num_sequences += x_BTI.shape[0]

    def hessian(self) -> Tensor:
        """Return the symmetric [I, I] Hessian; the accumulator's own memory is used and must not be added to again.

        Raises ValueError when nothing was added or an input was not finite.
        """
        if self.num_sequences == 0:
            raise ValueError("no calibration sequence reached this layer; give a calibration set that is not empty")
        hessian_II = self.sum_II.mul_(2 / self.num_sequences)
        if not bool(torch.isfinite(hessian_II.sum())):
            raise not_finite(self.dtype)
        hessian_II.triu_()
        return hessian_II.add_(hessian_II.triu(1).T)


def dead_columns(hessian_II: Tensor) -> Tensor:
    """Return the [I] mask of input features that were zero in every calibration token."""
    return hessian_II.diagonal() == 0
