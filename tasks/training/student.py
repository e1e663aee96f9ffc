"""What SFT, KD and GRPO have in common: which of the student's parameters train, and at which rate.

Departure: the paper does not say whether embeddings, head and norms are trained.  By default only the quantized
linears' weights are: what is stored in bf16 then stays exactly what it was, so that the saved checkpoint computes as
the student did, and rollout engines need no new embeddings (vLLM's CPU build keeps a tied head stale after a weight
update).
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import nn
from transformers import PreTrainedModel

from quant.linear import ScaleMode, quantized_linears
from tasks.training.loop import LoopConfig
from tasks.training.optimizer import GroupRule, adam

GRID_PATTERN = r"\.(scale|zero)$"


class StudentConfig(LoopConfig):
    """How the student is trained, whatever the objective: fp32 latents, computing in `mixed_precision`."""

    scale_mode: ScaleMode = "frozen"
    """frozen: the PTQ grid stays (the default for GPTQ starts); recomputed: min-max of the latent weights at every
    step (for RTN starts); learned: trained at `scale_learning_rate`."""
    scale_learning_rate: float = Field(default=1e-5, gt=0)
    train_embeddings: bool = False
    """Also train what is not quantized: embeddings, head, norms and biases."""
    gradient_checkpointing: bool = False
    attention: str = "sdpa"
    """transformers' attention implementation; "eager" is faster in bf16 on a CPU."""


def select_trainable(model: PreTrainedModel, config: StudentConfig) -> None:
    """Set `requires_grad` as the configuration says and switch on gradient checkpointing."""
    for parameter in model.parameters():
        parameter.requires_grad_(config.train_embeddings)
    for _, linear in quantized_linears(model):
        linear.weight.requires_grad_(True)
        for grid in (linear.scale, linear.zero):
            if isinstance(grid, nn.Parameter):
                grid.requires_grad_(config.scale_mode == "learned")
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def student_optimizers(objective: nn.Module, config: StudentConfig) -> list[torch.optim.Optimizer]:
    """Adam with a group for the latent weights and, where they are learned, one for scales and zeros."""
    rules = [GroupRule(GRID_PATTERN, config.scale_learning_rate)] if config.scale_mode == "learned" else []
    return adam(objective, config, rules)
