"""Equivalent scaling: channel scales moved from the input of linears into what produces it (AWQ, arXiv 2306.00978).

x W^T = (x / s) (W s)^T for any positive s per input channel.  Dividing what x comes from, a norm's weight or the rows
and bias of a linear, makes x / s cost nothing and leaves the block the same function.  That holds under Qwen3's q_norm
and k_norm too: the scale cancels inside the projection, before those norms.

Dimensions: O output features, I input features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quant.decoder import ATTENTION, ATTENTION_NORM, DOWN, INPUT_SITES, MLP, MLP_NORM, OUTPUT, UP, VALUE


@dataclass(frozen=True)
class ScalePair:
    """Linears with a common input, and where its scale goes; names are those within the decoder block."""

    source: str
    """The norm or linear that the input comes from, channel by channel."""
    targets: tuple[str, ...]
    """A group of LINEAR_GROUPS."""
    inspected: str
    """The module whose output says how good a scale is."""


def scale_pairs(block: nn.Module, *, scale_qkv: bool) -> list[ScalePair]:
    """The pairs of a Qwen2, Qwen3 or Llama block (mit-han-lab/llm-awq:awq/quantize/auto_scale.py, `auto_scale_block`).

    v -> o is one only where each value head feeds one query head: under grouped-query attention a value channel reaches
    several channels of o_proj, whose scales would have to agree.
    """
    v_proj, o_proj = block.get_submodule(VALUE), block.get_submodule(OUTPUT)
    pairs = [ScalePair(ATTENTION_NORM, INPUT_SITES[ATTENTION], ATTENTION)] if scale_qkv else []
    if v_proj.out_features == o_proj.in_features:
        pairs.append(ScalePair(VALUE, INPUT_SITES[OUTPUT], OUTPUT))
    pairs.append(ScalePair(MLP_NORM, INPUT_SITES[MLP], MLP))
    pairs.append(ScalePair(UP, INPUT_SITES[DOWN], DOWN))
    return pairs


@torch.no_grad()
def fold_scale(block: nn.Module, weights: dict[str, Tensor], pair: ScalePair, scale_I: Tensor) -> Tensor:
    """Divide the pair's source by scale_I [I], multiply its targets by it, and return the scale used.

    `weights` holds the weights [O, I] of the block's linears by name, in fp32 or more, and takes the scaled ones.  A
    norm weight or bias changes in the block, whose dtype it must keep: the scale used is scale_I moved by no more than
    that dtype's rounding error, such that the stored quotient is exact.
    """
    from_linear = pair.source in weights
    stored_I = dict(block.named_parameters()).get(f"{pair.source}.{'bias' if from_linear else 'weight'}")
    scale_I = scale_I.double()
    if stored_I is not None:
        quotient_I = (stored_I / scale_I).to(stored_I.dtype)
        scale_I = torch.where(quotient_I == 0, scale_I, stored_I.double() / quotient_I.double())
        stored_I.copy_(quotient_I)
    if from_linear:
        weights[pair.source] = (weights[pair.source] / scale_I[:, None]).to(weights[pair.source].dtype)
    for name in pair.targets:
        weights[name] = (weights[name] * scale_I).to(weights[name].dtype)
    return scale_I
