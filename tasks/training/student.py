"""What SFT, KD and GRPO have in common: which of the student's parameters train, and at which rate.

Departure: the paper does not say whether embeddings, head and norms are trained.  By default only the quantized
linears' weights are: what is stored in bf16 then stays exactly what it was, so that the saved checkpoint computes as
the student did, and rollout engines need no new embeddings (vLLM's CPU build keeps a tied head stale after a weight
update).
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from quant.student.linear import quantized_linears
from quant.student.sites import learned_parameters
from tasks.training.config import StudentConfig
from tasks.training.optimizer import GroupRule, adam

GRID_PATTERN = r"\.(scale|zero)$"
TRANSFORM_PATTERN = r"\.(left|right|diagonal)$"
CLIP_PATTERN = r"\.logits$"


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
