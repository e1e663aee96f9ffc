"""A student as a plain model, made independently of checkpoints and engines: what those are compared with."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from quant.student.linear import QuantLinear, quantized_linears
from quant.student.sites import INPUT_QUANTIZER, InputQuantizer, attach_input

Model = TypeVar("Model", bound=nn.Module)


@torch.no_grad()
def convert(model: Model) -> Model:
    """Put a plain nn.Linear with the rounded weights for each QuantLinear; outputs stay the same bits.

    Quantizers of activations and caches stay in place.
    """
    modules = dict(quantized_linears(model))
    for name in list(modules):
        module = modules.pop(name)  # one layer at a time has its old and new weights in memory
        weight_OI = module.rounded_weight(module.plain_dtype)
        linear = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(weight_OI)
        linear.register_parameter("bias", module.bias if module.basis is None else _bias_parameter(module))
        quantizer = getattr(module, INPUT_QUANTIZER, None)
        if isinstance(quantizer, InputQuantizer):
            attach_input(linear, quantizer)
        model.set_submodule(name, linear.train(module.training))
    return model


def _bias_parameter(module: QuantLinear) -> nn.Parameter | None:
    return None if module.bias is None else nn.Parameter(module.bias_in_basis().to(module.plain_dtype))
