"""The PTQ methods by name.

A new method is a module with its options (a frozen dataclass) and its block method, and a line in METHODS; if it has
options, also a section in `tasks.ptq_init.PTQInitConfig`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Generic, TypeVar

from quant.calibration.streaming import BlockMethod
from quant.grids.scheme import Scheme
from quant.methods.awq import awq_blocks
from quant.methods.block_methods import gptq_blocks, rtn_blocks
from quant.methods.flatquant import flatquant_blocks
from quant.methods.options import AWQOptions, FlatQuantOptions, GPTQOptions, QuaRotOptions, RTNOptions
from quant.methods.quarot import quarot_blocks

Options = TypeVar("Options")


def _any_scheme(_options: object, _scheme: Scheme) -> None:
    """The check of a method that does every scheme."""


@dataclass(frozen=True)
class Method(Generic[Options]):
    """A way to initialise QAT: its options, its block method, and the schemes it can do."""

    options: type[Options]
    block_method: Callable[[Options], BlockMethod]
    check: Callable[[Options, Scheme], None] = _any_scheme
    """Raises ValueError for schemes that the method cannot do, before anything is computed."""


def initializer(name: str) -> Method[Any]:
    """Return the method called `name`; ValueError names the valid ones."""
    if name not in METHODS:
        nearest = get_close_matches(name, METHODS, n=1)
        hint = f" did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"unknown PTQ method {name!r}:{hint} valid methods: {', '.join(METHODS)}")
    return METHODS[name]


METHODS: dict[str, Method[Any]] = {
    "rtn": Method(RTNOptions, rtn_blocks),
    "gptq": Method(GPTQOptions, gptq_blocks, check=GPTQOptions.check),
    "awq": Method(AWQOptions, awq_blocks, check=AWQOptions.check),
    "quarot": Method(QuaRotOptions, quarot_blocks, check=QuaRotOptions.check),
    "flatquant": Method(FlatQuantOptions, flatquant_blocks, check=FlatQuantOptions.check),
}
