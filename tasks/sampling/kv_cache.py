"""A key/value cache for batched decoding whose rows leave when they are finished.

transformers' DynamicCache copies the whole cache at every step (torch.cat) and again for grouped heads
(repeat_kv). Here each layer owns one preallocated buffer: a step writes one slot per row, attention reads a
view of it, and a finished row is overwritten by the last live one.

Dimensions: B rows, H key/value heads, R query heads per key/value head, S slots (tokens), D head size.
"""

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

GROUPED_ATTENTION = "grouped_decode_sdpa"


def grouped_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one new token per row that does not copy keys for grouped heads; else transformers' SDPA.

    The R query heads that share a key/value head take the place of query positions, so the strided cache
    view is read once, in place: query [B, H*R, 1, D], key and value [B, H, S, D], mask [B, 1, 1, S].
    """
    if query.shape[2] != 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    batch, num_heads, _, head_size = query.shape
    grouped = query.reshape(batch, key.shape[1], num_heads // key.shape[1], head_size)
    if attention_mask is not None:
        # Autocast may compute in another dtype than the model's parameters have.
        attention_mask = attention_mask.to(query.dtype).expand(-1, -1, grouped.shape[2], -1)
    output = nn.functional.scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scaling)
    return output.reshape(batch, 1, num_heads, head_size), None


AttentionInterface.register(GROUPED_ATTENTION, grouped_attention)
AttentionMaskInterface.register(GROUPED_ATTENTION, sdpa_mask)


class DecodeLayer(CacheLayerMixin):
    """One layer's buffer [B, H, S, D]; the first `num_rows` rows and `length` slots are in use."""

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, num_rows: int, length: int) -> None:
        super().__init__()
        self.num_rows = num_rows
        self.length = length

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate zeros, so that slots left of a shorter prompt are finite when attention masks them."""
        shape = (self.num_rows, key_states.shape[1], self.length)
        self.keys = key_states.new_zeros((*shape, key_states.shape[3]))
        self.values = value_states.new_zeros((*shape, value_states.shape[3]))
        self.is_initialized = True

    def place(self, layer: Any, first_row: int, source_rows: torch.Tensor) -> None:
        """Copy prefilled rows `source_rows` of `layer` to `first_row` onward, ending at the last slot in use."""
        if not self.is_initialized:
            self.lazy_initialization(layer.keys, layer.values)
        rows = slice(first_row, first_row + len(source_rows))
        slots = slice(self.length - layer.keys.shape[2], self.length)
        self.keys[rows, :, slots] = layer.keys[source_rows]
        self.values[rows, :, slots] = layer.values[source_rows]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the new token's keys and values; views of everything in use."""
        end = self.length + key_states.shape[2]
        self.keys[: self.num_rows, :, self.length : end] = key_states
        self.values[: self.num_rows, :, self.length : end] = value_states
        self.length = end
        return self.keys[: self.num_rows, :, :end], self.values[: self.num_rows, :, :end]

    def reserve(self, num_slots: int) -> None:
        """Make room for `num_slots` slots in total, copying only what is in use."""
        self.keys, self.values = self._grown(self.keys, num_slots), self._grown(self.values, num_slots)

    def _grown(self, buffer: torch.Tensor, num_slots: int) -> torch.Tensor:
        grown = buffer.new_empty((self.num_rows, buffer.shape[1], num_slots, buffer.shape[3]))
        grown[:, :, : self.length] = buffer[: self.num_rows, :, : self.length]
        return grown

    def drop(self, holes: torch.Tensor, movers: torch.Tensor, num_rows: int) -> None:
        """Move the rows `movers` into `holes`; afterwards the first `num_rows` rows are the live ones."""
        for buffer in (self.keys, self.values):
            buffer[holes, :, : self.length] = buffer[movers, :, : self.length]
        self.num_rows = num_rows

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1


class DecodeCache(Cache):
    """The layers' buffers; prompts are right-aligned at `length`, so one slot index serves every row."""

    def __init__(self, num_layers: int, num_rows: int, length: int) -> None:
        self.decode_layers = [DecodeLayer(num_rows, length) for _ in range(num_layers)]
        super().__init__(layers=list(self.decode_layers))
        self.num_slots = length

    def place(self, prefilled: DynamicCache, first_row: int, source_rows: torch.Tensor) -> None:
        """Take over the rows `source_rows` of a prefill; a row may be taken several times."""
        for layer, source in zip(self.decode_layers, prefilled.layers, strict=True):
            layer.place(source, first_row, source_rows)

    def reserve(self, num_slots: int) -> None:
        """Make room for `num_slots` slots in total."""
        for layer in self.decode_layers:
            layer.reserve(num_slots)
        self.num_slots = num_slots

    def drop(self, holes: torch.Tensor, movers: torch.Tensor, num_rows: int) -> None:
        """Fill the rows of finished sequences with live ones from the end."""
        for layer in self.decode_layers:
            layer.drop(holes, movers, num_rows)
