"""Invertible linear maps of a linear layer's inputs, and what they do to its weights.

A transform P on the inputs, x -> x P, leaves y = x W^T as it is when the weights follow, W -> W P^-T. QuaRot's
rotations and FlatQuant's affine maps are the same thing here: a Kronecker product of two small matrices, fixed and
orthogonal in the one and learned in the other (FlatQuant: ruikangliu/FlatQuant, flatquant/trans_utils.py).

Dimensions: I = A * B input features, seen as a matrix of A rows and B columns; x[..., I].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


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

    Keeps its input alone, where autograd would keep one more copy of it for each part. The right factor is one product
    of matrices; the left one a batch of them, which needs no transposed copies (on a CPU half the time, measured).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, diagonal_I: Tensor | None, left_AA: Tensor | None, right_BB: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x, diagonal_I, left_AA, right_BB)
        with torch.autocast(x.device.type, enabled=False):
            x_NAB = _as_matrices(_scaled(x, diagonal_I), left_AA, right_BB)
            return _left(_right(x_NAB, right_BB), left_AA).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, diagonal_I, left_AA, right_BB = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            x_NAB, grad_NAB = (_as_matrices(t, left_AA, right_BB) for t in (_scaled(x, diagonal_I), grads[0]))
            grad_left_AA = grad_right_BB = grad_diagonal_I = None
            if ctx.needs_input_grad[2]:
                x_AK, grad_AK = (t.transpose(0, 1).flatten(1) for t in (_right(x_NAB, right_BB), grad_NAB))
                grad_left_AA = (x_AK @ grad_AK.T).to(left_AA.dtype)
            grad_NAB = _left(grad_NAB, None if left_AA is None else left_AA.T)
            if ctx.needs_input_grad[3]:
                grad_right_BB = (x_NAB.flatten(0, 1).T @ grad_NAB.flatten(0, 1)).to(right_BB.dtype)
            grad_x = _right(grad_NAB, None if right_BB is None else right_BB.T).view(x.shape)
            if ctx.needs_input_grad[1]:
                rows = tuple(range(x.ndim - 1))
                grad_diagonal_I = (x * grad_x).sum(rows, dtype=torch.promote_types(x.dtype, torch.float32))
                grad_diagonal_I = grad_diagonal_I.to(diagonal_I.dtype)
            return _scaled(grad_x, diagonal_I), grad_diagonal_I, grad_left_AA, grad_right_BB


def _scaled(x: Tensor, diagonal_I: Tensor | None) -> Tensor:
    return x if diagonal_I is None else x * diagonal_I.to(x.dtype)


def _as_matrices(x: Tensor, left_AA: Tensor | None, right_BB: Tensor | None) -> Tensor:
    """x[..., A * B] as [N, A, B]."""
    num_columns = right_BB.shape[0] if right_BB is not None else x.shape[-1] // len(left_AA)  # type: ignore[arg-type]
    return x.reshape(-1, x.shape[-1] // num_columns, num_columns)


def _right(x_NAB: Tensor, right_BB: Tensor | None) -> Tensor:
    if right_BB is None:
        return x_NAB
    return (x_NAB.flatten(0, 1) @ right_BB.to(x_NAB.dtype)).view(x_NAB.shape)


def _left(x_NAB: Tensor, left_AA: Tensor | None) -> Tensor:
    """left^T X for each of the matrices."""
    if left_AA is None:
        return x_NAB
    transposed_AA = left_AA.T.to(x_NAB.dtype).contiguous()
    return torch.bmm(transposed_AA.expand(len(x_NAB), -1, -1), x_NAB)


@dataclass(frozen=True)
class WeightBasis:
    """The basis in which a linear's weights are quantized: transforms of its inputs in turn, and of its outputs."""

    inputs: tuple[KroneckerTransform, ...] = ()
    output: KroneckerTransform | None = None

    def weight(self, w_OI: Tensor) -> Tensor:
        for transform in self.inputs:
            w_OI = transform.inverse_transposed(w_OI)
        # Row-major, as a checkpoint stores them: the same weights in another layout give products with other last bits.
        return w_OI if self.output is None else self.output(w_OI.T).T.contiguous()

    def bias(self, bias_O: Tensor) -> Tensor:
        return bias_O if self.output is None else self.output(bias_O)
