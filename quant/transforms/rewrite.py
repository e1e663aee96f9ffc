"""Changes of a whole model that leave its function as it is, made part by part as the parts are read.

QuaRot rotates the hidden states that flow between the decoder layers, so the layers, the embeddings and the head change
together; none of them is needed to change another, and a checkpoint streams through one part at a time.

Dimensions: V vocabulary, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from torch import Tensor

from quant.decoder import DecoderShape
from quant.grids.scheme import Scheme


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
