"""The PTQ methods by name.

A new method is a module with a function that makes its block method, its options in options.py (a frozen dataclass that
refuses what it cannot do) and a line in METHODS; if it has options, also a section in `tasks.ptq_init.PTQInitConfig`.

The modules are named, not imported: this table is read by every command, and a stage's code is that of the method it
runs alone.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from quant.grids.scheme import Scheme
from quant.methods.options import AWQOptions, FlatQuantOptions, GPTQOptions, MethodOptions, QuaRotOptions, RTNOptions

if TYPE_CHECKING:
    from quant.calibration.streaming import BlockMethod

Options = TypeVar("Options", bound=MethodOptions)


@dataclass(frozen=True)
class Method(Generic[Options]):
    """A way to initialise QAT: its options, and where what it does stands."""

    options: type[Options]
    code: str
    """"module:function", a function of the options that gives a `BlockMethod`."""
    rewrites: bool = False
    """Its block method rewrites the model, and knows whether a model's sizes allow that."""

    def block_method(self, options: Options) -> BlockMethod:
        module, _, function = self.code.partition(":")
        made: BlockMethod = getattr(importlib.import_module(module), function)(options)
        return made

    def check(self, options: Options, scheme: Scheme) -> None:
        """Raise ValueError for a scheme that the method cannot do, before anything is computed."""
        options.check(scheme)


def initializer(name: str) -> Method[Any]:
    """Return the method called `name`; ValueError names the valid ones."""
    if name not in METHODS:
        nearest = get_close_matches(name, METHODS, n=1)
        hint = f" did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"unknown PTQ method {name[:60]!r}:{hint} valid methods: {', '.join(METHODS)}")
    return METHODS[name]


METHODS: dict[str, Method[Any]] = {
    "rtn": Method(RTNOptions, "quant.methods.rtn:rtn_blocks"),
    "gptq": Method(GPTQOptions, "quant.methods.gptq:gptq_blocks"),
    "awq": Method(AWQOptions, "quant.methods.awq:awq_blocks"),
    "quarot": Method(QuaRotOptions, "quant.methods.quarot:quarot_blocks", rewrites=True),
    "flatquant": Method(FlatQuantOptions, "quant.methods.flatquant:flatquant_blocks"),
}
