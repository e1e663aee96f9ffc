"""Group Relative Policy Optimization: advantages and loss (DeepSeekMath, arXiv 2402.03300, section 4.1).

Shapes: P prompts, G completions of a prompt, N completion tokens of a micro-batch, C of a chunk of them, V vocabulary.
All log-probabilities are those of softmax(logits / temperature), the distribution that is sampled from.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tasks.training.grpo_config import Normalization, PolicyConfig
from tasks.training.losses import ChunkLoss, entropy, token_log_probability

STD_GUARD = 1e-4
"""Keeps advantages finite where rewards differ by rounding only; the size is TRL's (trl/trainer/grpo_trainer.py)."""


def group_advantages(rewards_PG: Tensor, scale_by_std: bool = True) -> Tensor:
    """(reward - group mean) / group standard deviation (ddof 1), [P, G]; 0 throughout a group of equal rewards."""
    centred_PG = rewards_PG - rewards_PG.mean(1, keepdim=True)
    centred_PG = centred_PG.masked_fill(zero_variance(rewards_PG)[:, None], 0.0)
    if not scale_by_std:
        return centred_PG
    return centred_PG / (rewards_PG.std(1, keepdim=True) + STD_GUARD)


def zero_variance(rewards_PG: Tensor) -> Tensor:
    """Which groups have equal rewards throughout, and so say nothing, [P]."""
    return (rewards_PG == rewards_PG[:, :1]).all(1)


def token_weights(
    lengths: list[int], counted: list[bool], normalization: Normalization, max_new_tokens: int
) -> tuple[list[float], float]:
    """Weight of each completion's tokens, and the step's denominator.

    `counted` is False for a masked completion: its weight is 0, yet it stays a member of its group and, in "grpo" and
    "dr_grpo", of the number of sequences that is divided by.
    """
    if normalization == "grpo":
        return [c / n for n, c in zip(lengths, counted, strict=True)], float(len(lengths))
    weights = [float(c) for c in counted]
    if normalization == "dapo":
        return weights, float(max(1, sum(n for n, c in zip(lengths, counted, strict=True) if c)))
    return weights, float(len(lengths) * max_new_tokens)


@dataclass(frozen=True)
class TokenTerms:
    """What the loss needs of each completion token, [N]."""

    targets_N: Tensor
    advantages_N: Tensor
    weights_N: Tensor
    engine_N: Tensor
    """Log-probabilities by the engine that sampled; NaN where it gives none."""
    old_N: Tensor | None
    """Log-probabilities under the policy that made the rollout; None where that is the present one (on-policy)."""
    reference_N: Tensor | None


def policy_loss(terms: TokenTerms, config: PolicyConfig) -> ChunkLoss:
    """Clipped surrogate with optional KL term and importance weights.

    -w * (c * min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) - beta * k3), with r the ratio to the old policy, c the
    truncated importance weight, and k3 = exp(d) - d - 1, d = log reference - log policy
    (http://joschu.net/blog/kl-approx.html).
    """

    def loss(logits_CV: Tensor, tokens: slice) -> tuple[Tensor, dict[str, Tensor]]:
        logits_CV = logits_CV / config.generation.temperature
        logprob_C = token_log_probability(logits_CV, terms.targets_N[tokens])
        present_C = logprob_C.detach()
        old_C = present_C if terms.old_N is None else terms.old_N[tokens]
        advantages_C = terms.advantages_N[tokens]
        ratio_C = (logprob_C - old_C).exp()
        clipped_C = ratio_C.clamp(1 - config.clip_low, 1 + config.clip_high)
        surrogate_C = torch.minimum(ratio_C * advantages_C, clipped_C * advantages_C)
        statistics = {
            "logprob": present_C,
            "entropy": entropy(logits_CV.detach()),
            "clipped": ((ratio_C * advantages_C).detach() > surrogate_C.detach()).to(present_C.dtype),
        }
        if config.importance_sampling:
            importance_C = (old_C - terms.engine_N[tokens]).exp().clamp(max=config.importance_cap)
            surrogate_C = surrogate_C * importance_C
            statistics["importance"] = importance_C
        if terms.reference_N is not None:
            kl_C = k3(terms.reference_N[tokens] - logprob_C)
            surrogate_C = surrogate_C - config.beta * kl_C
            statistics["kl"] = kl_C.detach()
        return -terms.weights_N[tokens] * surrogate_C, statistics

    return loss


def k3(delta: Tensor) -> Tensor:
    """exp(delta) - delta - 1: unbiased, non-negative estimate of KL(p || q), delta = log q - log p at samples of p."""
    return delta.exp() - delta - 1


def policy_metrics(statistics: dict[str, Tensor], terms: TokenTerms, config: PolicyConfig) -> dict[str, Tensor]:
    """Per-token means for the log, as (sum, count), and the mismatch between the engine and the old policy.

    `mismatch_k3` estimates KL(engine || trainer); tokens without an engine log-probability are left out.
    """
    old_N = statistics["logprob"] if terms.old_N is None else terms.old_N
    delta_N = (old_N - terms.engine_N)[~terms.engine_N.isnan()]
    zero = delta_N.new_zeros(1)
    metrics = {
        "entropy": _mean(statistics["entropy"]),
        "clip_fraction": _mean(statistics["clipped"]),
        "mismatch_abs": _mean(delta_N.abs()),
        "mismatch_k3": _mean(k3(delta_N)),
        "max_mismatch": torch.cat([delta_N.abs(), zero]).max()[None],
    }
    if "kl" in statistics:
        metrics["kl"] = _mean(statistics["kl"])
    if config.importance_sampling:
        metrics["importance"] = _mean(statistics["importance"])
    return metrics


def _mean(values_N: Tensor) -> Tensor:
    return torch.stack([values_N.sum(), values_N.new_tensor(float(len(values_N)))])
