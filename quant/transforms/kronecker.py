"""Invertible linear maps of a linear layer's inputs, and what they do to its weights.

A transform P on the inputs, x -> x P, leaves y = x W^T as it is when the weights follow, W -> W P^-T. QuaRot's
rotations and FlatQuant's affine maps are the same thing here: a Kronecker product of two small matrices, fixed and
orthogonal in the one and learned in the other (FlatQuant: ruikangliu/FlatQuant, flatquant/trans_utils.py).

Dimensions: I = A * B input features, seen as a matrix of A rows and B columns; x[..., I].
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from quant.grids.chunks import row_chunks


class KroneckerTransform(nn.Module):
    """x -> (x * diagonal) (left kron right); each part may be absent, which stands for the identity.

    left_AA alone mixes attention heads (B is the head size), right_BB alone every head in itself. The parts compute in
    the dtype of x, under autocast too, so that a student's weights are those of its checkpoint; inverses in float64.
    """

    left: Tensor | None
    right: Tensor | None
    diagonal: Tensor | None

    def __init__(
        self, left_AA: Tensor | None = None, right_BB: Tensor | None = None, diagonal_I: Tensor | None = None, *,
        learned: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.learned = learned
        self._fixed_inverses: dict[str, Tensor] = {}
        for name, tensor in (("left", left_AA), ("right", right_BB), ("diagonal", diagonal_I)):
            tensor = None if tensor is None else tensor.detach().clone()
            if learned and tensor is not None:
                self.register_parameter(name, nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor)

    def forward(self, x: Tensor) -> Tensor:
        """x[..., I] P, in the dtype of x."""
        return _product(x, self.diagonal, self.left, self.right)

    def inverse_transposed(self, w_OI: Tensor) -> Tensor:
        """w_OI P^-T [O, I], in the dtype of w_OI: the weights that go with transformed inputs."""
        diagonal = None if self.diagonal is None else self.diagonal.double().reciprocal()
        return _product(w_OI, diagonal, *(self._inverse_transposed(name) for name in ("left", "right")))

    def inverse(self, x: Tensor) -> Tensor:
        """x[..., I] P^-1, in the dtype of x."""
        factors = (self._inverse_transposed(name) for name in ("left", "right"))
        x = _product(x, None, *(None if factor is None else factor.T for factor in factors))
        return x if self.diagonal is None else x / self.diagonal.to(x.dtype)

    def _inverse_transposed(self, name: str) -> Tensor | None:
        """Of a factor, in float64; computed once where the factor is fixed, for decoding needs it for every token."""
        factor: Tensor | None = getattr(self, name)
        if factor is None:
            return None
        if self.learned:
            return torch.linalg.inv(factor.double()).T
        inverse = self._fixed_inverses.get(name)
        if inverse is None or inverse.device != factor.device:
            inverse = self._fixed_inverses[name] = torch.linalg.inv(factor.double()).T
        return inverse

    @torch.no_grad()
    def condition_number(self) -> float:
        """Ratio of the largest to the least singular value of left kron right (the diagonal left out), in float64."""
        number = 1.0
        for factor in (self.left, self.right):
            if factor is not None:
                number *= float(torch.linalg.cond(factor.double()))
        return number

    def extra_repr(self) -> str:
        parts = {"left": self.left, "right": self.right, "diagonal": self.diagonal}
        shapes = [f"{name}={tuple(tensor.shape)}" for name, tensor in parts.items() if tensor is not None]
        return ", ".join([*shapes, f"learned={self.learned}"])


def balanced_factors(size: int) -> tuple[int, int]:
    """(A, B) with A * B = size and A <= B as near to each other as possible (FlatQuant's `get_decompose_dim`)."""
    left = next(a for a in range(int(size**0.5), 0, -1) if size % a == 0)
    return left, size // left


def _product(x: Tensor, diagonal_I: Tensor | None, left_AA: Tensor | None, right_BB: Tensor | None) -> Tensor:
    """(x * diagonal) (left kron right) in the dtype of x."""
    if left_AA is None and right_BB is None:
        return _scaled(x, diagonal_I)
    return _KroneckerProduct.apply(x, diagonal_I, left_AA, right_BB)


class _KroneckerProduct(torch.autograd.Function):
    """With x * diagonal as N matrices X of A rows and B columns: left^T X right, for at least one factor.

    Keeps its input alone, where autograd would keep one more copy of it for each part, and works on a few rows at a
    time: on a CPU the time is that of the passes through memory and of fresh memory for their results (measured).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, diagonal_I: Tensor | None, left_AA: Tensor | None, right_BB: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x, diagonal_I, left_AA, right_BB)
        x_NI = x.reshape(-1, x.shape[-1])
        out_NI = x.new_empty(x_NI.shape)
        with torch.autocast(x.device.type, enabled=False):
            factors = _Factors(left_AA, right_BB, x)
            for rows in _chunks(x_NI):
                factors.multiply(_scaled(x_NI[rows], diagonal_I), out_NI[rows])
        return out_NI.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, diagonal_I, left_AA, right_BB = ctx.saved_tensors
        x_NI, grad_NI = (tensor.reshape(-1, x.shape[-1]) for tensor in (x, grads[0]))
        grad_x_NI = x.new_empty(x_NI.shape)
        needed = [*zip((diagonal_I, left_AA, right_BB), ctx.needs_input_grad[1:], strict=True)]
        sums = [_accumulator(part, x.dtype) if needs else None for part, needs in needed]
        diagonal_sum, left_sum, right_sum = sums
        with torch.autocast(x.device.type, enabled=False):
            factors = _Factors(left_AA, right_BB, x)
            for rows in _chunks(x_NI):
                out_NI = grad_x_NI[rows]
                factors.gradients(_scaled(x_NI[rows], diagonal_I), grad_NI[rows], out_NI, left_sum, right_sum)
                if diagonal_sum is not None:
                    diagonal_sum += (x_NI[rows] * out_NI).sum(0, dtype=diagonal_sum.dtype)
                if diagonal_I is not None:
                    out_NI.mul_(diagonal_I.to(x.dtype))
        parts = (None if total is None else total.to(part.dtype) for (part, _), total in zip(needed, sums, strict=True))
        return grad_x_NI.view(x.shape), *parts


class _Factors:
    """left and right in the dtype of x. The right one is a product of matrices; the left one a batch of them, which
    needs no transposed copies (on a CPU half the time, measured)."""

    def __init__(self, left_AA: Tensor | None, right_BB: Tensor | None, x: Tensor) -> None:
        num_columns = right_BB.shape[0] if right_BB is not None else x.shape[-1] // len(left_AA)  # type: ignore[arg-type]
        self.shape = (-1, x.shape[-1] // num_columns, num_columns)
        self.left_AA = None if left_AA is None else left_AA.to(x.dtype)
        self.left_transposed_AA = None if self.left_AA is None else self.left_AA.T.contiguous()
        self.right_BB = None if right_BB is None else right_BB.to(x.dtype)

    def multiply(self, x_NI: Tensor, out_NI: Tensor) -> None:
        """out = x (left kron right)."""
        x_NAB, out_NAB = x_NI.reshape(self.shape), out_NI.view(self.shape)
        if self.left_transposed_AA is None:
            _times_right(x_NAB, self.right_BB, out_NAB)
        else:
            _left_times(self.left_transposed_AA, _times_right(x_NAB, self.right_BB), out_NAB)

    def gradients(
        self, x_NI: Tensor, grad_NI: Tensor, grad_x_NI: Tensor, left_sum: Tensor | None, right_sum: Tensor | None
    ) -> None:
        """grad_x = grad (left kron right)^T; the gradients of the factors are added to the sums."""
        x_NAB, grad_NAB, out_NAB = x_NI.reshape(self.shape), grad_NI.reshape(self.shape), grad_x_NI.view(self.shape)
        if left_sum is not None:
            x_AK, grad_AK = (t.transpose(0, 1).flatten(1) for t in (_times_right(x_NAB, self.right_BB), grad_NAB))
            left_sum += x_AK @ grad_AK.T
        if self.right_BB is None:
            _left_times(self.left_AA, grad_NAB, out_NAB)
            return
        grad_NAB = _left_times(self.left_AA, grad_NAB)
        if right_sum is not None:
            right_sum += x_NAB.flatten(0, 1).T @ grad_NAB.flatten(0, 1)
        _times_right(grad_NAB, self.right_BB.T, out_NAB)


def _scaled(x: Tensor, diagonal_I: Tensor | None) -> Tensor:
    return x if diagonal_I is None else x * diagonal_I.to(x.dtype)


def _chunks(x_NI: Tensor) -> Iterator[slice]:
    return row_chunks(len(x_NI), x_NI.shape[-1] * x_NI.element_size(), x_NI.device)


def _accumulator(part: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(part, dtype=torch.promote_types(dtype, torch.float32))


def _times_right(x_NAB: Tensor, right_BB: Tensor | None, out_NAB: Tensor | None = None) -> Tensor:
    if right_BB is None:
        return x_NAB
    out = None if out_NAB is None else out_NAB.flatten(0, 1)
    return torch.mm(x_NAB.flatten(0, 1), right_BB, out=out).view(x_NAB.shape)


def _left_times(left_AA: Tensor | None, x_NAB: Tensor, out_NAB: Tensor | None = None) -> Tensor:
    return x_NAB if left_AA is None else torch.bmm(left_AA.expand(len(x_NAB), -1, -1), x_NAB, out=out_NAB)


@dataclass(frozen=True)
class WeightBasis:
    """The basis in which a linear's weights are quantized: transforms of its inputs in turn, and of its outputs."""

    inputs: tuple[KroneckerTransform, ...] = ()
    output: KroneckerTransform | None = None

    @property
    def transforms(self) -> tuple[KroneckerTransform, ...]:
        return self.inputs if self.output is None else (*self.inputs, self.output)

    def weight(self, w_OI: Tensor) -> Tensor:
        for transform in self.inputs:
            w_OI = transform.inverse_transposed(w_OI)
        # Row-major, as a checkpoint stores them: the same weights in another layout give products with other last bits.
        return w_OI if self.output is None else self.output(w_OI.T).T.contiguous()

    def bias(self, bias_O: Tensor) -> Tensor:
        return bias_O if self.output is None else self.output(bias_O)
