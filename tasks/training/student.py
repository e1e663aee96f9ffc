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

from quant.student.linear import ScaleMode, quantized_linears
from quant.student.sites import learned_parameters
from tasks.training.loop import LoopConfig
from tasks.training.optimizer import GroupRule, adam

GRID_PATTERN = r"\.(scale|zero)$"
TRANSFORM_PATTERN = r"\.(left|right|diagonal)$"
CLIP_PATTERN = r"\.logits$"


class StudentConfig(LoopConfig):
    """How the student is trained, whatever the objective: fp32 latents, computing in `mixed_precision`."""

    scale_mode: ScaleMode = "frozen"
    """frozen: the PTQ grid stays (the default for GPTQ starts); recomputed: min-max of the latent weights at every
    step (for RTN and FlatQuant starts); learned: trained at `scale_learning_rate`."""
    scale_learning_rate: float = Field(default=1e-5, gt=0)
    transform_learning_rate: float = Field(default=5e-5, gt=0)
    """Of transforms and their scales, where a checkpoint has learned ones (FlatQuant; Table 6, W4A4)."""
    clip_learning_rate: float = Field(default=5e-4, gt=0)
    """Of clipping factors, likewise."""
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
    transforms, clips = learned_parameters(model)
    for parameter in (*transforms, *clips):
        parameter.requires_grad_(True)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def student_optimizers(objective: nn.Module, config: StudentConfig) -> list[torch.optim.Optimizer]:
    """Adam with a group for the latent weights and, where they are learned, for grids, for transforms and for clips."""
    transforms, clips = learned_parameters(objective)
    rules = [
        (config.scale_mode == "learned", GRID_PATTERN, config.scale_learning_rate),
        (bool(transforms), TRANSFORM_PATTERN, config.transform_learning_rate),
        (bool(clips), CLIP_PATTERN, config.clip_learning_rate),
    ]
    return adam(objective, config, [GroupRule(pattern, rate) for is_learned, pattern, rate in rules if is_learned])
