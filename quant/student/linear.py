"""The student's linear layers: latent float32 weights, fake-quantized in every forward pass.

A checkpoint's plain weights (site_tensors.folded_tensors) give the same outputs bit for bit.
Dimensions: O output features, I input features, G groups per row; x_BTI is batch, tokens, input features.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from quant.grids.affine import CHECKPOINT_DTYPE, LinearState, fake_quantize, grouped, minmax_grid, rtn, snap_grid
from quant.grids.dynamic import DynamicGrid, dynamic_gradients, dynamic_grid, dynamic_values
from quant.grids.scheme import ScaleMode, Scheme
from quant.student.sites import Clip, LayerSites, attach
from quant.student.targets import check_group_size, check_states, target_linears
from quant.transforms.kronecker import WeightBasis

Model = TypeVar("Model", bound=nn.Module)


class QuantLinear(nn.Module):
    """A linear layer that computes with its weights rounded to a grid, while training moves the latent ones.

    scale_mode "frozen" keeps the grid of `state`, which is part of a PTQ method's answer. "recomputed"
    ignores it and takes the range of the latent weights in every forward pass, without gradient. "learned"
    trains the scale and, if the scheme is asymmetric, the zero (LSQ). The paper leaves the choice open.

    With a `basis` (FlatQuant) the latent weights are those of the original model, and are transformed before they are
    rounded; with clip factors in `state`, their range, shrunken by the factors, is taken in every forward pass and the
    gradient passes through it. Both ask for scale_mode "recomputed".
    """

    bias: nn.Parameter | None
    scale: Tensor | None
    zero: Tensor | None

    def __init__(
        self,
        linear: nn.Linear,
        state: LinearState,
        scheme: Scheme,
        scale_mode: ScaleMode,
        basis: WeightBasis | None = None,
    ) -> None:
        super().__init__()
        if basis is not None and state.clip is None:
            raise ValueError("learned transforms come with learned clips of the weights, and this state has none")
        if state.clip is not None and scale_mode != "recomputed":
            raise ValueError(
                f"scale_mode {scale_mode!r} does not go with learned transforms or clips, whose grid follows from "
                "them: set scale_mode='recomputed'"
            )
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
        self.basis = basis  # its transforms belong to the layer's sites, not to this module
        self.weight_clip = None if state.clip is None else Clip(state.clip.to(linear.weight.device), learned=True)
        self.materialized_weight: Tensor | None = None

    def forward(self, x_BTI: Tensor) -> Tensor:
        dtype = _compute_dtype(x_BTI.device, x_BTI.dtype)
        weight_OI = self.materialized_weight
        weight_OI = self.rounded_weight(dtype) if weight_OI is None else weight_OI.to(dtype)
        return F.linear(x_BTI, weight_OI, None if self.bias is None else self.bias_in_basis().to(dtype))

    def bias_in_basis(self) -> Tensor:
        """The bias [O] that goes with `rounded_weight`."""
        assert self.bias is not None, "asked for where there is one"
        return self.bias if self.basis is None else self.basis.bias(self.bias)

    def weight_in_basis(self) -> Tensor:
        """The latent weights [O, I] as they are before rounding, in fp32."""
        return self.weight if self.basis is None else self.basis.weight(self.weight)

    def rounded_weight(self, dtype: torch.dtype) -> Tensor:
        """The weights [O, I] that the layer computes with: dequantized, rounded to bf16, given as `dtype`."""
        if self.weight.dtype != torch.float32:
            raise ValueError(
                f"latent weights became {self.weight.dtype}; they must stay float32, or updates get lost: "
                "move the prepared model with .to(device) only, and use autocast for bf16 computation"
            )
        if self.weight_clip is not None:
            return _RoundedInBasis.apply(self, dtype, *self._parameters_of_weights(self.weight_clip))
        scale_OG, zero_OG = self.scale, self.zero
        if scale_OG is None or zero_OG is None:
            scale_OG, zero_OG = _minmax(self.weight, self.scheme)
        return fake_quantize(self.weight, scale_OG, zero_OG, self.scheme, dtype)

    def _parameters_of_weights(self, clip: Clip) -> list[Tensor]:
        """Weights, clips and transforms, all that `rounded_weight` depends on."""
        modules = (clip, *(() if self.basis is None else self.basis.transforms))
        return [self.weight, *(parameter for module in modules for parameter in module.parameters())]

    def clipped_groups(self) -> tuple[Tensor, DynamicGrid, Tensor]:
        """The transformed weights [O, G, K], their grid, and the factors [O, G, 2] of their range."""
        assert self.weight_clip is not None, "asked for where ranges are clipped"
        scheme = self.scheme
        grid = DynamicGrid(scheme.bits, scheme.symmetric, clamp=True, scale_dtype=scheme.torch_scale_dtype)
        return grouped(self.weight_in_basis(), scheme), grid, self.weight_clip()

    @torch.no_grad()
    def grid(self) -> tuple[Tensor, Tensor]:
        """(scale_OG, zero_OG) that the forward pass uses now, as stored, detached."""
        if self.scale is not None and self.zero is not None:
            return snap_grid(self.scale, self.zero, self.scheme)
        if self.weight_clip is None:
            return _minmax(self.weight, self.scheme)
        scale_OG1, zero_OG1 = dynamic_grid(*self.clipped_groups())
        return scale_OG1.squeeze(-1), zero_OG1.squeeze(-1)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.scheme.name}, scale_mode={self.scale_mode!r}"


class _RoundedInBasis(torch.autograd.Function):
    """The rounded weights of a linear with clips, and with transforms if it has a basis.

    Keeps parameters only, and computes the transformed weights again in backward: kept, they would double the memory
    of the weights. `parameters` are all that the result depends on.
    """

    @staticmethod
    def forward(ctx: Any, linear: QuantLinear, dtype: torch.dtype, *parameters: Tensor) -> Tensor:
        ctx.linear = linear
        ctx.save_for_backward(*parameters)
        return dynamic_values(*linear.clipped_groups(), CHECKPOINT_DTYPE, dtype).view_as(linear.weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        needs, parameters = ctx.needs_input_grad[2:], ctx.saved_tensors
        with torch.enable_grad():
            weight_OGK, grid, factors = ctx.linear.clipped_groups()
        found = zip((weight_OGK, factors), dynamic_gradients(weight_OGK, grid, factors, grads[0]), strict=True)
        outputs, output_gradients = zip(*(pair for pair in found if pair[0].requires_grad), strict=True)
        wanted = [parameter for parameter, needed in zip(parameters, needs, strict=True) if needed]
        gradients = iter(torch.autograd.grad(outputs, wanted, output_gradients))
        return None, None, *(next(gradients) if needed else None for needed in needs)


def prepare(
    model: Model,
    scheme: Scheme,
    states: Mapping[str, LinearState] | None,
    scale_mode: ScaleMode,
    sites: Mapping[str, LayerSites] | None = None,
) -> Model:
    """Put a QuantLinear, in place, for every nn.Linear of `model` but the output embeddings; returns `model`.

    `sites` are the quantizers of activations and caches by the full name of the decoder layer. Learned transforms are
    the basis of the layer's weights; with fixed ones the states are in that basis already.
    `states` comes from a PTQ method, by layer name; None rounds the model's own weights to nearest. All
    is checked before the first layer is touched; ValueError names the layers and what to change.
    """
    if scale_mode not in get_args(ScaleMode):
        raise ValueError(f"scale_mode must be one of {', '.join(get_args(ScaleMode))}, not {scale_mode!r}")
    linears = target_linears(model)
    check_group_size(model, scheme)
    if states is not None:
        check_states(linears, scheme, states)
    for name in list(linears):
        linear = linears.pop(name)  # one layer at a time has its old and new weights in memory
        state = rtn(linear.weight, scheme) if states is None else states[name]
        basis = _learned_basis(name, sites or {})
        model.set_submodule(name, QuantLinear(linear, state, scheme, scale_mode, basis).train(linear.training))
    for layer, layer_sites in (sites or {}).items():
        attach(model.get_submodule(layer), layer_sites)
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
        clip = None if module.weight_clip is None else module.weight_clip.logits.detach()
        states[name] = LinearState(module.weight.detach(), scale_OG, zero_OG, clip)
    return states


def _learned_basis(name: str, sites: Mapping[str, LayerSites]) -> WeightBasis | None:
    """The basis of the linear's weights where transforms are learned; None where they are fixed, or absent."""
    layer = next((layer for layer in sites if name.startswith(f"{layer}.")), None)
    if layer is None:
        return None
    basis = sites[layer].weight_basis(name.removeprefix(f"{layer}."))
    return basis if any(transform.learned for transform in basis.transforms) else None


@torch.no_grad()
def _minmax(weight_OI: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    scale_OG1, zero_OG1 = minmax_grid(grouped(weight_OI, scheme), scheme)
    return scale_OG1.squeeze(-1), zero_OG1.squeeze(-1)


def _hold(module: nn.Module, name: str, tensor: Tensor | None, *, trainable: bool) -> None:
    if trainable and tensor is not None:
        module.register_parameter(name, nn.Parameter(tensor))
    else:
        module.register_buffer(name, tensor)


def _compute_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which F.linear will compute on inputs of `dtype`."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else dtype
