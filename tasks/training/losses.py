"""Losses of the language-model head, computed in chunks of tokens.

At 8192 tokens and a vocabulary of 151,936 one fp32 logits tensor takes 5 GB, and student, teacher and gradient each
need one.  Here no [tokens, vocabulary] tensor exists: each chunk's loss and its gradient with respect to the hidden
states (and the head, when it is trained) are computed in the forward pass, and the chunk's logits are dropped.

Shapes: N tokens, H hidden size, V vocabulary, C tokens of a chunk, K cached teacher entries.
Precision: logits are computed in the compute dtype (autocast's, else that of the hidden states), as the inference
engines do, and everything after them in fp32 (in fp64 for fp64 input).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tasks.training.config import Direction

ChunkLoss = Callable[[Tensor, slice], tuple[Tensor, dict[str, Tensor]]]
"""(logits_CV, which tokens) -> (loss_C, statistics by name, each [C] and outside the graph)."""

CHUNK_ELEMENTS_ACCELERATOR = 2**25
"""Elements of a chunk's logits: 128 MiB in fp32, 220 tokens of a vocabulary of 151,936."""
CHUNK_ELEMENTS_CPU = 2**23
"""32 MiB in fp32: glibc takes larger buffers from the kernel anew each time, and with those of an accelerator the loss
takes 2.6 to 3.5 times as long (measured at 49,152 entries; benchmarks/README.md)."""

MIN_TAIL = 1e-7
"""Least teacher probability of all uncached entries together: below it 1 - sum is rounding noise in fp32."""


def chunk_size(weight_VH: Tensor) -> int:
    """Tokens per chunk for this head."""
    limit = CHUNK_ELEMENTS_CPU if weight_VH.device.type == "cpu" else CHUNK_ELEMENTS_ACCELERATOR
    return max(1, limit // len(weight_VH))


def head_logits(hidden_CH: Tensor, weight_VH: Tensor) -> Tensor:
    """Logits [C, V] in at least fp32, after a matmul in the compute dtype."""
    dtype = _compute_dtype(hidden_CH)
    logits_CV = hidden_CH.to(dtype) @ weight_VH.to(dtype).T
    return logits_CV if logits_CV.dtype == torch.float64 else logits_CV.float()


def head_loss(
    hidden_NH: Tensor, weight_VH: Tensor, chunk_loss: ChunkLoss, chunk: int | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum over the tokens of `chunk_loss`, and its statistics [N]; differentiable in `hidden_NH` and `weight_VH`."""
    size = chunk or chunk_size(weight_VH)
    dtype = _compute_dtype(hidden_NH)
    needs_grad = torch.is_grad_enabled() and (hidden_NH.requires_grad or weight_VH.requires_grad)
    work = _Work(hidden_NH.detach(), weight_VH.detach(), dtype, needs_grad, needs_grad and weight_VH.requires_grad)
    with torch.autocast(hidden_NH.device.type, enabled=False):
        parts = [work.run(slice(i, i + size), chunk_loss) for i in range(0, hidden_NH.shape[0], size)]
    loss = work.loss
    if needs_grad:
        loss = _WithGradients.apply(loss, hidden_NH, weight_VH, work.grad_NH, work.grad_VH)
    names = parts[0].keys() if parts else ()
    return loss, {name: torch.cat([part[name] for part in parts]) for name in names}


class _Work:
    """Accumulates the loss and the gradients of `head_loss` chunk by chunk."""

    def __init__(self, hidden_NH: Tensor, weight_VH: Tensor, dtype: torch.dtype, grad: bool, weight_grad: bool) -> None:
        self.hidden_NH, self.weight_VH = hidden_NH, weight_VH.to(dtype)
        accumulator = torch.float64 if dtype == torch.float64 else torch.float32
        self.loss = torch.zeros((), dtype=accumulator, device=hidden_NH.device)
        self.grad_NH = torch.empty_like(hidden_NH) if grad else None
        self.grad_VH = torch.zeros_like(weight_VH, dtype=accumulator) if weight_grad else None

    def run(self, tokens: slice, chunk_loss: ChunkLoss) -> dict[str, Tensor]:
        hidden_CH = self.hidden_NH[tokens].to(self.weight_VH.dtype)
        with torch.no_grad():
            logits_CV = head_logits(hidden_CH, self.weight_VH)
        with torch.set_grad_enabled(self.grad_NH is not None):
            logits_CV.requires_grad_(self.grad_NH is not None)
            loss_C, statistics = chunk_loss(logits_CV, tokens)
            loss = loss_C.sum()
        self.loss += loss.detach()
        if self.grad_NH is not None:
            (grad_CV,) = torch.autograd.grad(loss, logits_CV)
            with torch.no_grad():
                grad_CV = grad_CV.to(self.weight_VH.dtype)
                self.grad_NH[tokens] = (grad_CV @ self.weight_VH).to(self.grad_NH.dtype)
                if self.grad_VH is not None:
                    self.grad_VH += grad_CV.T @ hidden_CH
        return statistics


class _WithGradients(torch.autograd.Function):
    """Passes the loss through and hands out the gradients that were computed with it."""

    @staticmethod
    def forward(
        ctx: Any, loss: Tensor, hidden_NH: Tensor, weight_VH: Tensor, grad_NH: Tensor, grad_VH: Tensor | None
    ) -> Tensor:
        ctx.grad_NH, ctx.grad_VH, ctx.weight_dtype = grad_NH, grad_VH, weight_VH.dtype
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, Tensor | None, None, None]:
        grad_VH = None if ctx.grad_VH is None else (ctx.grad_VH * grad).to(ctx.weight_dtype)
        return None, ctx.grad_NH * grad.to(ctx.grad_NH.dtype), grad_VH, None, None


def cross_entropy(targets_N: Tensor) -> ChunkLoss:
    """Minus the log-probability of the target tokens (SFT)."""

    def loss(logits_CV: Tensor, tokens: slice) -> tuple[Tensor, dict[str, Tensor]]:
        return -token_log_probability(logits_CV, targets_N[tokens]), {}

    return loss


def kl_divergence(
    teacher_NH: Tensor, teacher_weight_VH: Tensor, direction: Direction = "forward", temperature: float = 1.0
) -> ChunkLoss:
    """KL between teacher and student; forward is KL(teacher || student).

    Both distributions are softened by `temperature` and the loss is multiplied by its square, which keeps the size of
    the gradient (Hinton et al. 2015, https://arxiv.org/abs/1503.02531, section 2).
    """

    def loss(logits_CV: Tensor, tokens: slice) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            teacher_CV = head_logits(teacher_NH[tokens], teacher_weight_VH).to(logits_CV.dtype)
            teacher_CV = torch.log_softmax(teacher_CV / temperature, -1)
        student_CV = torch.log_softmax(logits_CV / temperature, -1)
        return temperature**2 * _kl(teacher_CV, student_CV, direction), {}

    return loss


def kl_top_k(
    values_NK: Tensor, indices_NK: Tensor, direction: Direction = "forward", temperature: float = 1.0
) -> ChunkLoss:
    """KL to a teacher of which only the `values_NK` largest log-probabilities (at `temperature`) are known.

    All other entries count as one: the KL is between distributions over K + 1 outcomes, the last being "none of the
    K".  That is a lower bound of the full KL, equal to it at K = V, and its gradient holds the student's total tail
    mass to the teacher's; renormalising over the K entries instead would leave that mass free.
    """

    def loss(logits_CV: Tensor, tokens: slice) -> tuple[Tensor, dict[str, Tensor]]:
        indices_CK = indices_NK[tokens].long()
        student_CV = torch.log_softmax(logits_CV / temperature, -1)
        known_CK = student_CV.gather(-1, indices_CK)
        teacher_CK = values_NK[tokens].to(logits_CV.dtype)
        if indices_CK.shape[-1] == logits_CV.shape[-1]:
            return temperature**2 * _kl(teacher_CK, known_CK, direction), {}
        tail_C1 = student_CV.scatter(-1, indices_CK, -math.inf).logsumexp(-1, keepdim=True)
        teacher_tail_C1 = (1.0 - teacher_CK.exp().sum(-1, keepdim=True)).clamp(min=MIN_TAIL).log()
        return temperature**2 * _kl(
            torch.cat([teacher_CK, teacher_tail_C1], -1), torch.cat([known_CK, tail_C1], -1), direction
        ), {}

    return loss


def token_log_probability(logits_CV: Tensor, targets_C: Tensor) -> Tensor:
    """log softmax(logits)[target], [C]."""
    return logits_CV.gather(-1, targets_C[:, None]).squeeze(-1) - logits_CV.logsumexp(-1)


def entropy(logits_CV: Tensor) -> Tensor:
    """Entropy in nats of softmax(logits), [C]."""
    log_p_CV = torch.log_softmax(logits_CV, -1)
    return -(log_p_CV.exp() * log_p_CV).sum(-1)


def _kl(teacher: Tensor, student: Tensor, direction: Direction) -> Tensor:
    """KL over the last axis of log-probabilities."""
    weight, other = (teacher, student) if direction == "forward" else (student, teacher)
    return (weight.exp() * (weight - other)).sum(-1)


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
