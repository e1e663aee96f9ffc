"""Numbers in configurations: each kind's bounds stand here once, so that a field that is declared again keeps them."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

MOST = 2**31 - 1
"""Of any count: beyond it, steps, tokens or bytes are a typing mistake, and C libraries overflow."""


def _no_truth_value(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a number is needed, not true or false")
    return value


_Number = BeforeValidator(_no_truth_value)

Named = Annotated[str, Field(min_length=1)]
"""Names a thing: as a path, nothing at all would be the folder that the command was typed in."""
Count = Annotated[int, _Number, Field(gt=0, le=MOST)]
"""One or more."""
Whole = Annotated[int, _Number, Field(ge=0, le=MOST)]
"""None or more."""
Seed = Annotated[int, _Number, Field(ge=0, le=MOST)]
Rate = Annotated[float, _Number, Field(gt=0, le=10.0)]
"""A learning rate."""
Positive = Annotated[float, _Number, Field(gt=0, le=1e9)]
NonNegative = Annotated[float, _Number, Field(ge=0, le=1e9)]
Share = Annotated[float, _Number, Field(ge=0, le=1)]
PositiveShare = Annotated[float, _Number, Field(gt=0, le=1)]
