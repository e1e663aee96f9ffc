"""What is quantized and how: bits, groups, symmetry, the scale rule and the dtype in which scales are stored.

Activations (A) and the key/value cache (KV) are quantized dynamically, one asymmetric grid per token, or per token and
head, of the range widened to include 0 (paper, section 4.1; QRM:methods/utils/quant_utils.py): see dynamic.py.

Conventions (b bits, scale s, zero z; codes q are integers and w ~ s * (q - z); paper, Eq. 1):

- symmetric, "paper": s = max|w| / (2^(b-1) - 1), q in [-2^(b-1), 2^(b-1) - 1], z = 0 (so also QRM =
  ruikangliu/Quantized-Reasoning-Models:methods/utils/quant_utils.py).
- symmetric, "full_range": s = 2 max|w| / (2^b - 1), the same codes, z = 0. IST-DASLab/gptq:quant.py writes
  this grid with codes [0, 2^b - 1] and the mid-point zero 2^(b-1); compressed-tensors uses it too.
- asymmetric: s = (max - min) / (2^b - 1), z = round(-min / s), q in [0, 2^b - 1]. The range is first widened
  to include 0, as QRM and GPTQ do, so that zero is a level. It fills its range and knows one scale rule only.

A scale is rounded to `scale_dtype` before any use, so that a packed export holds the student's numbers.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    import torch

ScaleRule = Literal["paper", "full_range"]
ScaleDtype = Literal["bfloat16", "float16", "float32"]
ScaleMode = Literal["frozen", "recomputed", "learned"]
"""What becomes of a student's grid while its weights train: see student/linear.py."""

PER_CHANNEL = -1
# One bit has no symmetric grid under the paper's rule (2^0 - 1 = 0); beyond eight, codes do not fit a byte.
MIN_BITS, MAX_BITS = 2, 8
USUAL_GROUP_SIZES = (32, 64, 128, 256)
PRESETS = (
    *(f"W{b}{group}" for b in (2, 3, 4, 8) for group in ("", "G32", "G64", "G128", "G256")),
    *("W4A4KV4", "W4A4", "W4A8", "W4A8KV4", "W8A8", "W8A8KV8"),
)

# What "A16" and "KV16" say: not quantized.
UNQUANTIZED_BITS = 16

_NAME = re.compile(r"(W|G|A|KV)(\d+)")


def code_range(bits: int, symmetric: bool) -> tuple[int, int]:
    """The least and the largest code."""
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)


@dataclass(frozen=True)
class Scheme:
    """A quantization scheme; `Scheme.parse("W3G128")` or `Scheme.parse("W4A4KV4")` is the usual way to make one.

    `bits`, `group_size`, `symmetric`, `scale_rule` and `scale_dtype` are those of the weights.
    """

    bits: int
    group_size: int = PER_CHANNEL
    symmetric: bool = True
    scale_rule: ScaleRule = "paper"
    scale_dtype: ScaleDtype = "bfloat16"
    activation_bits: int | None = None
    """Of the inputs of every quantized linear, dynamic, per token, asymmetric; None leaves them as they are."""
    kv_bits: int | None = None
    """Of keys (after RoPE) and values, dynamic, per token and head, asymmetric; None leaves them as they are."""

    def __post_init__(self) -> None:
        for field in ("bits", "activation_bits", "kv_bits"):
            bits = getattr(self, field)
            if bits is not None and not MIN_BITS <= bits <= MAX_BITS:
                raise ValueError(f"{field} must be from {MIN_BITS} to {MAX_BITS}, not {bits}")
        if self.group_size != PER_CHANNEL and self.group_size < 1:
            raise ValueError(f"group_size must be positive or {PER_CHANNEL}, not {self.group_size}")
        for field, choices in (("scale_rule", get_args(ScaleRule)), ("scale_dtype", get_args(ScaleDtype))):
            if getattr(self, field) not in choices:
                raise ValueError(f"{field} must be one of {', '.join(choices)}, not {getattr(self, field)!r}")
        if not self.symmetric and self.scale_rule != "paper":
            raise ValueError("scale_rule is for symmetric schemes: leave it out, or set symmetric=True")

    @classmethod
    def parse(cls, name: str, **options: Any) -> "Scheme":
        """`W<bits>[G<group size>][A<bits>][KV<bits>]`: "W3G128", "W4A4KV4"; without G one group per output channel.

        ValueError for any other name, with the nearest valid one.
        """
        parts = _NAME.findall(name.strip().upper())
        number = {letter: int(digits) for letter, digits in parts}
        text = "".join(letter + digits for letter, digits in parts)
        if text != name.strip().upper() or not text.startswith("W") or len(number) < len(parts):
            raise ValueError(_explain_unknown(name))
        activation_bits, kv_bits = (
            None if number.get(letter, UNQUANTIZED_BITS) == UNQUANTIZED_BITS else number[letter]
            for letter in ("A", "KV")
        )
        group_size = number.get("G", PER_CHANNEL)
        return cls(number["W"], group_size, activation_bits=activation_bits, kv_bits=kv_bits, **options)

    @property
    def name(self) -> str:
        """The name that `parse` reads: bits and group size; the other fields are options."""
        parts = [f"W{self.bits}"]
        parts += [] if self.group_size == PER_CHANNEL else [f"G{self.group_size}"]
        parts += [] if self.activation_bits is None else [f"A{self.activation_bits}"]
        parts += [] if self.kv_bits is None else [f"KV{self.kv_bits}"]
        return "".join(parts)

    @property
    def weight_only(self) -> bool:
        return self.activation_bits is None and self.kv_bits is None

    @property
    def qmin(self) -> int:
        return code_range(self.bits, self.symmetric)[0]

    @property
    def qmax(self) -> int:
        return code_range(self.bits, self.symmetric)[1]

    @property
    def code_dtype(self) -> "torch.dtype":
        """The byte type that holds every code of this scheme."""
        import torch

        return torch.int8 if self.symmetric else torch.uint8

    @property
    def torch_scale_dtype(self) -> "torch.dtype":
        import torch

        return getattr(torch, self.scale_dtype)

    def num_groups(self, in_features: int) -> int:
        """Groups per row; ValueError names the group sizes that do work for `in_features`."""
        if self.group_size == PER_CHANNEL:
            return 1
        if in_features % self.group_size:
            works = ", ".join(map(str, working_group_sizes([in_features])))
            raise ValueError(
                f"{self.name}: group size {self.group_size} does not divide {in_features} input features; "
                f"group sizes that work: {works} ({PER_CHANNEL} is one group per channel)"
            )
        return in_features // self.group_size

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Scheme":
        """The inverse of `to_dict`; ValueError for fields that this version does not know."""
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown scheme fields {unknown}; this version knows {sorted(known)}")
        if "bits" not in values:
            raise ValueError("a scheme needs the field 'bits'")
        return cls(**values)


def working_group_sizes(in_features: list[int]) -> list[int]:
    """The usual group sizes that divide every one of `in_features`, and -1, which always works."""
    return [size for size in USUAL_GROUP_SIZES if all(n % size == 0 for n in in_features)] + [PER_CHANNEL]


def _explain_unknown(name: str) -> str:
    text = name.strip().upper()
    nearest = get_close_matches(text, PRESETS, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    return (
        f"unknown scheme {name!r}: {hint}A name is W<bits>[G<group size>][A<bits>][KV<bits>], "
        "such as 'W3G128', 'W4A4KV4', or 'W4' for one group per output channel"
    )
