"""The decoders that are quantized, by the names of their modules: the only file that knows q_proj from down_proj.

Llama, Qwen2 and Qwen3 name them alike in transformers, and so do their checkpoints.  Plain data: no torch is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MODEL_TYPES = {"Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3", "LlamaForCausalLM": "llama"}
"""What config.json calls them: architecture, model type."""

EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
"""The tensors of a checkpoint around its decoder layers.  A head tied to the embeddings has no tensor of its own."""
LAYERS = "model.layers"

ATTENTION, MLP = "self_attn", "mlp"
"""The modules of a decoder layer, and below their linears and the norms before them, by their names in it."""
QUERY, KEY, VALUE, OUTPUT = (f"{ATTENTION}.{letter}_proj" for letter in "qkvo")
GATE, UP, DOWN = (f"{MLP}.{name}_proj" for name in ("gate", "up", "down"))
ATTENTION_NORM, MLP_NORM = "input_layernorm", "post_attention_layernorm"

INPUT_SITES = {ATTENTION: (KEY, VALUE, QUERY), OUTPUT: (OUTPUT,), MLP: (UP, GATE), DOWN: (DOWN,)}
"""The module at each input site of a decoder layer in the order of computation, and the linears that read what it is
given."""
LINEAR_GROUPS = tuple(INPUT_SITES.values())
"""The linears of a decoder layer in calibration order; those of one group have the same input."""
NORMS = {ATTENTION: ATTENTION_NORM, MLP: MLP_NORM}
"""The norm before a site."""

VLLM_SITES = {f"{ATTENTION}.qkv_proj": ATTENTION, OUTPUT: OUTPUT, f"{MLP}.gate_up_proj": MLP, DOWN: DOWN}
"""The site of each linear of a decoder layer in vLLM, which makes one of q, k and v, and one of gate and up."""
VLLM_ATTENTION = f"{ATTENTION}.attn"
"""Where vLLM's attention sees keys and values."""


def layer_name(index: int) -> str:
    """The full name of a decoder layer."""
    return f"{LAYERS}.{index}"


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
