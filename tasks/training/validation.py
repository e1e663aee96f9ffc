"""Held-out measures: what a training stage is judged by while it runs, on data that it does not train on.

SFT is measured by its loss.  KD by the KL divergence of the student from the full-precision teacher at temperature 1,
whatever direction, temperature or cache it trains with, so that runs compare; the KL on the prompts' tokens, which
nothing trains, is logged beside it.  GRPO by the share of right completions, sampled as rollouts are, but with the same
random streams each time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tasks.training.batches import Example, by_length, collate
from tasks.training.config import StudentConfig
from tasks.training.grpo_config import GRPOTrainConfig
from tasks.training.loop import Batch
from tasks.training.losses import ChunkLoss, cross_entropy, head_loss, kl_divergence
from tasks.training.objectives import head_weight, predicting_states
from tasks.training.rollouts import Answers, Prompt, completion_seed
from tasks.training.selection import Measure

LossOf = Callable[[Batch], ChunkLoss]


def cross_entropy_measure(model: PreTrainedModel, examples: Sequence[Example], config: StudentConfig) -> Measure:
    """Nats per predicted token."""

    def figures(step: int) -> dict[str, float]:
        losses = token_losses(model, examples, config, lambda batch: cross_entropy(batch["targets"]))
        return {"cross_entropy": _mean(losses)}

    return Measure("cross_entropy", higher_is_better=False, figures=figures)


def divergence_measure(
    model: PreTrainedModel, teacher: PreTrainedModel, examples: Sequence[Example], config: StudentConfig
) -> Measure:
    """KL(teacher || student) in nats per predicted token, and on the tokens before them, where there are any."""
    whole = [replace(example, start=1) for example in examples]

    def loss_of(batch: Batch) -> ChunkLoss:
        return kl_divergence(predicting_states(teacher, batch), head_weight(teacher).detach())

    def figures(step: int) -> dict[str, float]:
        losses = token_losses(model, whole, config, loss_of)
        starts = [example.start - 1 for example in examples]
        prompts = [loss[:start] for loss, start in zip(losses, starts, strict=True)]
        found = {"kl": _mean([loss[start:] for loss, start in zip(losses, starts, strict=True)])}
        return found | ({"prompt_kl": _mean(prompts)} if any(starts) else {})

    return Measure("kl", higher_is_better=False, figures=figures)


def accuracy_measure(prompts: Sequence[Prompt], answers: Answers, config: GRPOTrainConfig) -> Measure:
    """Share of the problems that the judge calls rightly answered."""
    seeds = [completion_seed(config.seed, "validation", place) for place in range(len(prompts))]

    def figures(step: int) -> dict[str, float]:
        _, _, verdicts = answers(prompts, seeds, step)
        return {"accuracy": sum(verdict.correct for verdict in verdicts) / len(verdicts)}

    return Measure("accuracy", higher_is_better=True, figures=figures)


@torch.no_grad()
def token_losses(
    model: PreTrainedModel, examples: Sequence[Example], config: StudentConfig, loss_of: LossOf
) -> list[Tensor]:
    """The loss of each predicted token of each example, float64, by the computation of the training loss."""
    found: dict[int, Tensor] = {}
    with _as_evaluated(model, config):
        for group in by_length(examples, lambda example: len(example.ids), config.micro_batch_size):
            batch = {name: value.to(model.device) for name, value in collate(group).items()}
            hidden_NH, weight_VH = predicting_states(model, batch), head_weight(model)
            _, statistics = head_loss(hidden_NH, weight_VH, _itself(loss_of(batch)))
            losses_N = statistics["loss"].cpu().double()
            for example, losses in zip(group, losses_N.split([e.num_targets for e in group]), strict=True):
                found[example.row] = losses
    return [found[example.row] for example in examples]


def _itself(chunk_loss: ChunkLoss) -> ChunkLoss:
    """A chunk loss whose statistic is the loss."""

    def loss(logits_CV: Tensor, tokens: slice) -> tuple[Tensor, dict[str, Tensor]]:
        loss_C, _ = chunk_loss(logits_CV, tokens)
        return loss_C, {"loss": loss_C}

    return loss


@contextmanager
def _as_evaluated(model: PreTrainedModel, config: StudentConfig) -> Iterator[None]:
    """In evaluation mode and in the precision that training computes in."""
    was_training = model.training
    model.eval()
    try:
        with torch.autocast(model.device.type, torch.bfloat16, enabled=config.mixed_precision == "bf16"):
            yield
    finally:
        model.train(was_training)


def _mean(losses: Sequence[Tensor]) -> float:
    return float(torch.cat(list(losses)).mean())
