"""The PTQ methods by name.  A new method is a module, a block method here, and a line in METHODS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches

import torch

from quant.affine import fake_quantize
from quant.gptq import GPTQOptions, gptq_shared
from quant.rtn import rtn
from quant.scheme import Scheme
from quant.streaming import LINEAR_GROUPS, BlockMethod, BlockRun, LinearResult


@dataclass(frozen=True)
class Method:
    """A way to initialise QAT: its block method, what it needs, and the schemes it can do."""

    block_method: Callable[[GPTQOptions], BlockMethod]
    needs_calibration: bool
    check: Callable[[Scheme, GPTQOptions], None]
    """Raises ValueError for schemes that the method cannot do, before anything is computed."""


def initializer(name: str) -> Method:
    """Return the method called `name`; ValueError names the valid ones."""
    if name not in METHODS:
        nearest = get_close_matches(name, METHODS, n=1)
        hint = f" did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"unknown PTQ method {name!r}:{hint} valid methods: {', '.join(METHODS)}")
    return METHODS[name]


def _rtn_blocks(_options: GPTQOptions) -> BlockMethod:
    def quantize(run: BlockRun, scheme: Scheme) -> dict[str, LinearResult]:
        results = {}
        for name in (name for group in LINEAR_GROUPS for name in group):
            w_OI = run.linear(name).weight.detach().float()
            state = rtn(w_OI, scheme)
            difference_OI = w_OI - fake_quantize(state.weight, state.scale, state.zero, scheme, torch.float32)
            results[name] = LinearResult(state, {"error": float(difference_OI.square().sum() / w_OI.square().sum())})
            run.replace(name, state, scheme)
        return results

    return quantize


def _gptq_blocks(options: GPTQOptions) -> BlockMethod:
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

    return quantize


def _any_scheme(_scheme: Scheme, _options: GPTQOptions) -> None:
    """Round-to-nearest does every scheme."""


METHODS = {
    "rtn": Method(_rtn_blocks, needs_calibration=False, check=_any_scheme),
    "gptq": Method(_gptq_blocks, needs_calibration=True, check=lambda scheme, options: options.check(scheme)),
}
