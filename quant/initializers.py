"""The PTQ methods by name.

A new method is a module with its options (a frozen dataclass) and its block method, and a line in METHODS; if it has
options, also a section in `tasks.ptq_init.PTQInitConfig`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Generic, TypeVar

from quant.awq import AWQOptions, awq_blocks
from quant.block_methods import RTNOptions, gptq_blocks, rtn_blocks
from quant.flatquant import flatquant_blocks
from quant.flatquant_training import FlatQuantOptions
from quant.gptq import GPTQOptions
from quant.quarot import QuaRotOptions, quarot_blocks
from quant.scheme import Scheme
from quant.streaming import BlockMethod

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
