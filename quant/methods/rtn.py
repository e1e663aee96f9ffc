"""Round-to-nearest: the weights as they are, on the grid of their own range (paper, Eq. 1, "RTN")."""

from torch import Tensor

from quant.grids.affine import LinearState, grouped, minmax_grid
from quant.grids.scheme import Scheme


def rtn(w_OI: Tensor, scheme: Scheme) -> LinearState:
    """The latent weights are w_OI [O, I] itself, in float32; ValueError if a weight is not finite."""
    if not w_OI.is_meta and not w_OI.isfinite().all():
        raise ValueError("the weights hold infinities or NaN; a quantization grid needs finite weights")
    scale_OG1, zero_OG1 = minmax_grid(grouped(w_OI.detach(), scheme), scheme)
    return LinearState(w_OI.detach().float(), scale_OG1.squeeze(-1), zero_OG1.squeeze(-1))
