"""The student's linear layers: latent float32 weights, fake-quantized in every forward pass.

`prepare` and `convert` are inverse in structure, and `convert` keeps the outputs bit for bit.
Dimensions: O output features, I input features, G groups per row; x_BTI is batch, tokens, input features.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, TypeVar, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quant.affine import LinearState, fake_quantize, grouped, minmax_grid, snap_grid
from quant.rtn import rtn
from quant.scheme import PER_CHANNEL, Scheme, working_group_sizes

ScaleMode = Literal["frozen", "recomputed", "learned"]
Model = TypeVar("Model", bound=nn.Module)
# How many layer names an error spells out before it counts the rest.
NUM_NAMES_SHOWN = 3


class QuantLinear(nn.Module):
    """A linear layer that computes with its weights rounded to a grid, while training moves the latent ones.

    scale_mode "frozen" keeps the grid of `state`, which is part of a PTQ method's answer. "recomputed"
    ignores it and takes the range of the latent weights in every forward pass, without gradient. "learned"
    trains the scale and, if the scheme is asymmetric, the zero (LSQ). The paper leaves the choice open.
    """

    bias: nn.Parameter | None
    scale: Tensor | None
    zero: Tensor | None

    def __init__(self, linear: nn.Linear, state: LinearState, scheme: Scheme, scale_mode: ScaleMode) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scheme, self.scale_mode = scheme, scale_mode
        self.plain_dtype = linear.weight.dtype  # the dtype that the rest of the model computes in
        self.bias = linear.bias
        # Float32, because updates of the paper's size (learning rate 1e-6) vanish in bf16. Copies, so that
        # training never writes into the caller's state.
        weight, scale, zero = (
            tensor.detach().to(linear.weight.device, torch.float32, copy=True)
            for tensor in (state.weight, state.scale, state.zero)
        )
        self.weight = nn.Parameter(weight)
        recomputed, learned = scale_mode == "recomputed", scale_mode == "learned"
        _hold(self, "scale", None if recomputed else scale, trainable=learned)
        _hold(self, "zero", None if recomputed else zero, trainable=learned and not scheme.symmetric)
        self.materialized_weight: Tensor | None = None

    def forward(self, x_BTI: Tensor) -> Tensor:
        dtype = _compute_dtype(x_BTI.device, x_BTI.dtype)
        weight_OI = self.materialized_weight
        weight_OI = self.rounded_weight(dtype) if weight_OI is None else weight_OI.to(dtype)
        return F.linear(x_BTI, weight_OI, None if self.bias is None else self.bias.to(dtype))

    def rounded_weight(self, dtype: torch.dtype) -> Tensor:
        """The weights [O, I] that the layer computes with: dequantized, rounded to bf16, given as `dtype`."""
        if self.weight.dtype != torch.float32:
            raise ValueError(
                f"latent weights became {self.weight.dtype}; they must stay float32, or updates get lost: "
                "move the prepared model with .to(device) only, and use autocast for bf16 computation"
            )
        scale_OG, zero_OG = self.scale, self.zero
        if scale_OG is None or zero_OG is None:
            scale_OG, zero_OG = self.grid()
        return fake_quantize(self.weight, scale_OG, zero_OG, self.scheme, dtype)

    @torch.no_grad()
    def grid(self) -> tuple[Tensor, Tensor]:
        """(scale_OG, zero_OG) that the forward pass uses now, as stored, detached."""
        if self.scale is not None and self.zero is not None:
            return snap_grid(self.scale, self.zero, self.scheme)
        scale_OG1, zero_OG1 = minmax_grid(grouped(self.weight, self.scheme), self.scheme)
        return scale_OG1.squeeze(-1), zero_OG1.squeeze(-1)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.scheme.name}, scale_mode={self.scale_mode!r}"


def prepare(model: Model, scheme: Scheme, states: Mapping[str, LinearState] | None, scale_mode: ScaleMode) -> Model:
    """Put a QuantLinear, in place, for every nn.Linear of `model` but the output embeddings; returns `model`.

    `states` comes from a PTQ method, by layer name; None rounds the model's own weights to nearest. All
    is checked before the first layer is touched; ValueError names the layers and what to change.
    """
    if scale_mode not in get_args(ScaleMode):
        raise ValueError(f"scale_mode must be one of {', '.join(get_args(ScaleMode))}, not {scale_mode!r}")
    linears = target_linears(model)
    check_group_size(model, scheme)
    if states is not None:
        _check_states(linears, scheme, states)
    for name in list(linears):
        linear = linears.pop(name)  # one layer at a time has its old and new weights in memory
        state = rtn(linear.weight, scheme) if states is None else states[name]
        model.set_submodule(name, QuantLinear(linear, state, scheme, scale_mode).train(linear.training))
    return model


@torch.no_grad()
def convert(model: Model) -> Model:
    """Put a plain nn.Linear with the rounded weights for each QuantLinear; outputs stay the same bits."""
    modules = dict(quantized_linears(model))
    for name in list(modules):
        module = modules.pop(name)  # one layer at a time has its old and new weights in memory
        weight_OI = module.rounded_weight(module.plain_dtype)
        linear = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(weight_OI)
        linear.register_parameter("bias", module.bias)
        model.set_submodule(name, linear.train(module.training))
    return model


@contextmanager
def materialized(model: nn.Module) -> Iterator[None]:
    """Inside, each QuantLinear computes with weights rounded once, on entry, and gradients are off: generate.

    Latent weights changed inside count only after it. On leaving, also by an exception, all is as before.
    """
    modules = [module for _, module in quantized_linears(model)]
    before = [module.materialized_weight for module in modules]
    try:
        with torch.no_grad():
            for module in modules:
                dtype = _compute_dtype(module.weight.device, module.plain_dtype)
                module.materialized_weight = module.rounded_weight(dtype)
            yield
    finally:
        for module, weight_OI in zip(modules, before, strict=True):
            module.materialized_weight = weight_OI


def quantized_linears(model: nn.Module) -> Iterator[tuple[str, QuantLinear]]:
    """(name, module) of each QuantLinear, in the model's order."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, QuantLinear))


def linear_states(model: nn.Module) -> dict[str, LinearState]:
    """What a checkpoint keeps of each QuantLinear: latent weights (not copied) and grid, scales as stored."""
    states = {}
    for name, module in quantized_linears(model):
        scale_OG, zero_OG = module.grid()
        scale_OG = scale_OG.to(module.scheme.torch_scale_dtype)
        states[name] = LinearState(module.weight.detach(), scale_OG, zero_OG)
    return states


def target_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linears to quantize, by name: all but the output embeddings, tied or not (paper, section 3.1)."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and name.rpartition(".")[2] != "lm_head"
    }
    if not linears:
        raise ValueError("the model has no nn.Linear to quantize; if it is prepared, convert it first")
    return linears


def check_group_size(model: nn.Module, scheme: Scheme) -> None:
    """ValueError if the group size does not divide the inputs of every layer, with group sizes that do."""
    widths: dict[int, list[str]] = {}
    for name, linear in target_linears(model).items():
        widths.setdefault(linear.in_features, []).append(name)
    if scheme.group_size == PER_CHANNEL:
        return
    misfits = {width: names for width, names in widths.items() if width % scheme.group_size}
    if not misfits:
        return
    bad = "; ".join(f"{width} input features in {_shorten(names)}" for width, names in misfits.items())
    works = ", ".join(map(str, working_group_sizes(list(widths))))
    raise ValueError(
        f"{scheme.name}: group size {scheme.group_size} does not divide {bad}. "
        f"Group sizes that work for all layers: {works} ({PER_CHANNEL} is one group per channel)"
    )


def _check_states(linears: Mapping[str, nn.Linear], scheme: Scheme, states: Mapping[str, LinearState]) -> None:
    if missing := [name for name in linears if name not in states]:
        raise ValueError(f"no quantization state for {_shorten(missing)}; was it made for another model?")
    if unknown := [name for name in states if name not in linears]:
        raise ValueError(f"quantization states for layers that the model lacks: {_shorten(unknown)}")
    for name, linear in linears.items():
        num_out, num_in = linear.weight.shape
        grid_shape = (num_out, scheme.num_groups(num_in))
        state = states[name]
        shapes = tuple(state.weight.shape), tuple(state.scale.shape), tuple(state.zero.shape)
        if shapes != ((num_out, num_in), grid_shape, grid_shape):
            raise ValueError(
                f"{name}: weight, scale and zero have shapes {shapes}, but {scheme.name} needs "
                f"{(num_out, num_in)}, {grid_shape} and {grid_shape}; was the state made for another scheme?"
            )
        scale_OG, zero_OG = snap_grid(state.scale, state.zero, scheme)
        if not state.scale.is_meta and not (scale_OG.equal(state.scale.float()) and zero_OG.equal(state.zero.float())):
            raise ValueError(
                f"{name}: the grid is not one of {scheme.name} ({scheme.scale_dtype} scales, integer zeros); "
                "make it with minmax_grid or mse_grid, which round before use"
            )


def _hold(module: nn.Module, name: str, tensor: Tensor | None, *, trainable: bool) -> None:
    if trainable and tensor is not None:
        module.register_parameter(name, nn.Parameter(tensor))
    else:
        module.register_buffer(name, tensor)


def _compute_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which F.linear will compute on inputs of `dtype`."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else dtype


def _shorten(names: list[str]) -> str:
    rest = len(names) - NUM_NAMES_SHOWN
    return ", ".join(names[:NUM_NAMES_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
