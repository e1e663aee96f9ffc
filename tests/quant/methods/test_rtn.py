"""Round-to-nearest as a quantization method: the weights stay, the grid is that of their range."""

import pytest
import torch

from quant.grids.affine import grouped, minmax_grid, rtn
from quant.grids.scheme import Scheme


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_latent_weights_are_the_weights_and_the_grid_their_range(dtype: torch.dtype) -> None:
    scheme = Scheme.parse("W3G32", symmetric=False)
    w_OI = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    state = rtn(w_OI, scheme)
    scale_OG1, zero_OG1 = minmax_grid(grouped(w_OI, scheme), scheme)
    assert state.weight.dtype == torch.float32 and torch.equal(state.weight, w_OI.float())
    assert torch.equal(state.scale[..., None], scale_OG1) and torch.equal(state.zero[..., None], zero_OG1)
    assert state.scale.shape == (6, 2)


def test_a_parameter_gives_a_state_without_graph() -> None:
    state = rtn(torch.nn.Parameter(torch.ones(2, 32)), Scheme.parse("W4G32"))
    assert not (state.weight.requires_grad or state.scale.requires_grad or state.zero.requires_grad)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(bad: float) -> None:
    w_OI = torch.ones(2, 32)
    w_OI[1, 7] = bad
    with pytest.raises(ValueError, match="needs finite weights"):
        rtn(w_OI, Scheme.parse("W4G32"))
