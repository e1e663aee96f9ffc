"""The options of every PTQ method: what a configuration holds of them.  Plain data; importing it loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from quant.grids.scheme import Scheme

MAX_DAMPING = 1.0
"""With more than the mean diagonal added, compensation is all but off: that would be round-to-nearest in disguise."""
MAX_SEED = 2**32 - 1


@dataclass(frozen=True)
class MethodOptions:
    """What every method's options can be asked for."""

    def check(self, scheme: Scheme) -> None:
        """Raise ValueError for a scheme that the method cannot do; most do every one."""

    def _within(self, name: str, low: float, high: float) -> None:
        """Raise ValueError unless low <= the field <= high, which neither NaN nor infinity is."""
        value: Any = getattr(self, name)
        if not low <= value <= high:
            usual = type(self).__dataclass_fields__[name].default
            raise ValueError(f"{name} must lie between {low} and {high}, not {value}; usual is {usual}")


@dataclass(frozen=True)
class RTNOptions(MethodOptions):
    """Round-to-nearest has none."""


@dataclass(frozen=True)
class GPTQOptions(MethodOptions):
    """How GPTQ runs; the defaults are the paper's command (QRM:scripts/quantization/gptq.sh)."""

    act_order: bool = True
    """Columns by falling Hessian diagonal instead of left to right."""
    static_groups: bool = True
    """Every group's grid from the original weights; otherwise from the compensated weights when its turn comes."""
    mse_clip: bool = True
    """Search the grid that clips with the least error instead of covering the whole range."""
    damping: float = 0.01
    """Added to the diagonal, as a share of its mean."""
    block_size: int = 128
    """Columns between two updates of the remaining matrix: speed only, the result differs by rounding errors."""

    def __post_init__(self) -> None:
        self._within("damping", 0, MAX_DAMPING)
        self._within("block_size", 1, 2**16)

    def check(self, scheme: Scheme) -> None:
        """Raise ValueError when the result could not be stored: a group must be a run of neighbouring columns."""
        if self.act_order and not self.static_groups and scheme.group_size > 0:
            raise ValueError(
                "act_order without static_groups makes groups of scattered columns, which no checkpoint format holds; "
                "set static_groups=True or act_order=False"
            )


@dataclass(frozen=True)
class AWQOptions(MethodOptions):
    """How AWQ runs; the defaults are the published constants, search_tokens excepted."""

    num_ratios: int = 20
    """Exponents r tried: 0, 1/num_ratios ... (num_ratios - 1)/num_ratios."""
    scale_qkv: bool = True
    """Scale the inputs of q, k and v.  Exact under q/k norm too; llm-compressor leaves them out for Gemma 3."""
    clip: bool = True
    search_tokens: int = 2048
    """Calibration tokens on which the exponents are compared, rounded up to whole batches."""

    def __post_init__(self) -> None:
        self._within("num_ratios", 1, 1000)
        self._within("search_tokens", 1, 10**9)

    def check(self, scheme: Scheme) -> None:
        """Raise ValueError for a scheme that quantizes activations or the cache: the search would not see it."""
        if not scheme.weight_only:
            raise ValueError(
                f"awq quantizes weights only, and {scheme.name} more: choose method 'gptq', 'quarot' or 'flatquant'"
            )


PUBLISHED_GPTQ = GPTQOptions(act_order=False)
"""quarot.sh asks for the MSE clip, which is on by default, and not for act-order."""


@dataclass(frozen=True)
class QuaRotOptions(MethodOptions):
    """How QuaRot runs; the defaults are the published settings (QRM:scripts/quantization/quarot.sh)."""

    weights: Literal["gptq", "rtn"] = "gptq"
    """How the rotated weights are quantized."""
    gptq: GPTQOptions | None = None
    """None for the published settings."""
    activation_clip: float = 0.9
    """The range of a token's activations is multiplied by it; 1 clips nothing."""
    kv_clip: float = 0.95
    """Likewise of the keys and values of a token and head."""
    seed: int = 0
    """Of the signs of Q."""

    def __post_init__(self) -> None:
        if self.weights not in ("gptq", "rtn"):
            raise ValueError(f"weights must be 'gptq' or 'rtn', not {self.weights!r}")
        if self.weights == "rtn" and self.gptq is not None:
            raise ValueError("gptq holds options of another way to quantize weights than 'rtn': set it to null")
        for name in ("activation_clip", "kv_clip"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie above 0 and not above 1, not {getattr(self, name)}; 1 clips nothing")
        self._within("seed", 0, MAX_SEED)

    def check(self, scheme: Scheme) -> None:
        """Raise ValueError for a scheme that the weights' method cannot do."""
        if self.weights == "gptq":
            (self.gptq or PUBLISHED_GPTQ).check(scheme)


@dataclass(frozen=True)
class FlatQuantOptions(MethodOptions):
    """How FlatQuant is calibrated; the defaults are the published constants."""

    epochs: int = 15
    learning_rate: float = 5e-3
    """Of transforms and scales; clips learn ten times as fast.  Cosine decay to a thousandth."""
    max_condition_number: float = 1e4
    """Of any transform, its scales left out."""
    max_retries: int = 3
    """Restarts of a block that became ill-conditioned or not finite, each at a third of the learning rate."""
    seed: int = 0

    def __post_init__(self) -> None:
        self._within("epochs", 1, 10_000)
        self._within("learning_rate", 1e-12, 1)
        self._within("max_condition_number", 1 + 1e-6, 1e12)
        self._within("max_retries", 0, 100)
        self._within("seed", 0, MAX_SEED)

    def check(self, scheme: Scheme) -> None:
        """ValueError for schemes that leave activations as they are."""
        if scheme.activation_bits is None:
            raise ValueError(
                f"flatquant transforms activations for their quantization, and {scheme.name} does not quantize them: "
                "use a scheme such as W4A4KV4, or method 'gptq' or 'awq'"
            )
