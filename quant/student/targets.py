"""Which linears of a model are quantized, and whether a scheme and a PTQ method's states fit them."""

from collections.abc import Mapping

from torch import nn

from quant.decoder import HEAD
from quant.grids.affine import LinearState, snap_grid
from quant.grids.scheme import PER_CHANNEL, Scheme, working_group_sizes

# How many layer names an error spells out before it counts the rest.
NUM_NAMES_SHOWN = 3


def target_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linears to quantize, by name: all but the output embeddings, tied or not (paper, section 3.1)."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and not f".{name}.weight".endswith(f".{HEAD}")
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


def check_states(linears: Mapping[str, nn.Linear], scheme: Scheme, states: Mapping[str, LinearState]) -> None:
    """ValueError if a linear has no state, or one of another shape or scheme."""
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


def _shorten(names: list[str]) -> str:
    rest = len(names) - NUM_NAMES_SHOWN
    return ", ".join(names[:NUM_NAMES_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
