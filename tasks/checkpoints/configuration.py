"""The values of config.json and generation_config.json that sizes and stopping depend on, each checked by itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from tasks.data.wording import shorten
from tasks.runtime.stage import StageError

SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
OPTIONAL_SIZES = ("num_key_value_heads", "head_dim")
MOST = 2**31 - 1
DTYPES = ("float32", "float16", "bfloat16", "auto")
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")

Refuse = Callable[[str], StageError]


def check_configuration(config: Mapping[str, Any], refuse: Refuse) -> None:
    """Raise what `refuse` makes of the first value that no model has."""
    for name in (*SIZES, *OPTIONAL_SIZES):
        value = config.get(name)
        if value is None and name in OPTIONAL_SIZES:
            continue
        if type(value) is not int or not 1 <= value <= MOST:
            raise refuse(f"{name} must be a positive whole number, not {shorten(repr(value), 60)}")
    heads, groups = config["num_attention_heads"], config.get("num_key_value_heads") or 1
    if heads % groups:
        raise refuse(f"num_key_value_heads {groups} does not divide num_attention_heads {heads}")
    if config.get("head_dim") is None and config["hidden_size"] % heads:
        raise refuse(f"num_attention_heads {heads} does not divide hidden_size {config['hidden_size']}")
    epsilon = config.get("rms_norm_eps", 1e-6)
    if type(epsilon) not in (int, float) or not math.isfinite(epsilon) or not 0 <= epsilon < 1:
        raise refuse(f"rms_norm_eps must be a small number, not {shorten(repr(epsilon), 60)}")
    if config.get("tie_word_embeddings") not in (None, True, False):
        raise refuse("tie_word_embeddings must be true or false")
    for name in ("dtype", "torch_dtype"):
        if config.get(name) not in (None, *DTYPES):
            raise refuse(f"{name} must be one of {', '.join(DTYPES)}, not {shorten(repr(config[name]), 60)}")
    check_token_ids(config, config["vocab_size"], refuse)


def check_token_ids(config: Mapping[str, Any], vocab_size: int, refuse: Refuse) -> None:
    """Raise what `refuse` makes of a special token that is no token of the model; a padding token may be -1."""
    for name in TOKEN_IDS:
        value = config.get(name)
        ids = value if isinstance(value, list) and name == "eos_token_id" else [] if value is None else [value]
        least = -1 if name == "pad_token_id" else 0
        if not all(type(token) is int and least <= token < vocab_size for token in ids):
            raise refuse(f"{name} must name tokens of 0 to {vocab_size - 1}, not {shorten(repr(value), 60)}")
