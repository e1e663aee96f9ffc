"""Round-to-nearest as a block method: the weights as they are, on the grid of their own range (paper, Eq. 1, "RTN")."""

from __future__ import annotations

import torch

from quant.calibration.streaming import BlockMethod, BlockRun, LinearResult
from quant.decoder import LINEAR_GROUPS
from quant.grids.affine import fake_quantize, rtn
from quant.grids.scheme import Scheme
from quant.methods.options import RTNOptions


def rtn_blocks(_options: RTNOptions) -> BlockMethod:
    """Every linear by itself, without calibration."""

    def quantize(run: BlockRun, scheme: Scheme) -> dict[str, LinearResult]:
        results = {}
        for name in (name for group in LINEAR_GROUPS for name in group):
            w_OI = run.linear(name).weight.detach().float()
            state = rtn(w_OI, scheme)
            difference_OI = w_OI - fake_quantize(state.weight, state.scale, state.zero, scheme, torch.float32)
            results[name] = LinearResult(state, {"error": float(difference_OI.square().sum() / w_OI.square().sum())})
            run.replace(name, state, scheme)
        return results

    return BlockMethod(quantize, needs_calibration=False)
