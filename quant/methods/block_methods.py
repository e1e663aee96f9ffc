"""Round-to-nearest and GPTQ as block methods: what quantizes the weights, whatever was done to the model before."""

from __future__ import annotations

import torch

from quant.calibration.streaming import LINEAR_GROUPS, BlockMethod, BlockRun, LinearResult
from quant.grids.affine import fake_quantize
from quant.grids.scheme import Scheme
from quant.methods.gptq import gptq_shared
from quant.methods.options import GPTQOptions, RTNOptions
from quant.methods.rtn import rtn


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


def gptq_blocks(options: GPTQOptions) -> BlockMethod:
    """Group by group, each on what the quantized ones before it give; ValueErrors name block and linears."""

    def quantize(run: BlockRun, scheme: Scheme) -> dict[str, LinearResult]:
        results = {}
        for group in LINEAR_GROUPS:
            weights = {name: run.linear(name).weight for name in group}
            try:
                group_results = gptq_shared(weights, run.hessian(group), scheme, options)
            except ValueError as error:
                raise ValueError(f"block {run.index}, {', '.join(group)}: {error}") from error
            for name, result in group_results.items():
                report = {
                    "error": result.error,
                    "damping": result.damping_used,
                    "retries": result.num_retries,
                    "dead_columns": result.num_dead,
                }
                results[name] = LinearResult(result.state, report)
                run.replace(name, result.state, scheme)
        return results

    return BlockMethod(quantize)
