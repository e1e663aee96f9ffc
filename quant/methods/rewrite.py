"""Changes of a whole model that leave its function as it is, made part by part as the parts are read.

QuaRot rotates the hidden states that flow between the decoder layers, so the layers, the embeddings and the head change
together; none of them is needed to change another, and a checkpoint streams through one part at a time.

Dimensions: V vocabulary, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from quant.grids.scheme import Scheme


@dataclass(frozen=True)
class DecoderShape:
    """The sizes that a decoder layer's transforms have to fit."""

    hidden_size: int
    intermediate_size: int
    num_heads: int
    head_dim: int

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> DecoderShape:
        """From the content of a config.json: head_dim is its own there (Qwen3), hidden size / heads if absent."""
        hidden_size, num_heads = config["hidden_size"], config["num_attention_heads"]
        head_dim = config.get("head_dim") or hidden_size // num_heads
        return cls(hidden_size, config["intermediate_size"], num_heads, head_dim)

    @property
    def in_features(self) -> tuple[int, ...]:
        """The widths of all linears' inputs."""
        return self.hidden_size, self.num_heads * self.head_dim, self.intermediate_size


class Rewrite(Protocol):
    """Each method computes in float64 and returns new tensors in the dtypes of the given ones."""

    def block(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """A decoder layer's tensors by their names in it -> the new ones, and those of its sites (student/sites.py)."""

    def embedding(self, embedding_VH: Tensor) -> Tensor:
        """The input embeddings."""

    def head(self, head_VH: Tensor, norm_H: Tensor) -> tuple[Tensor, Tensor]:
        """The output embeddings, which are no longer tied to the others, and the weights of the norm before them."""


RewriteFactory = Callable[[DecoderShape, Scheme], Rewrite]
"""Raises ValueError for a shape that the method cannot do."""
