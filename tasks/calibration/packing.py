"""From texts to the rows of a calibration artifact.

Dimensions: N sequences, T tokens of each.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tasks.calibration.config import CalibrateConfig
from tasks.calibration.traces import Trace
from tasks.runtime.stage import StageError

# Between two joined texts, as in the reference.
SEPARATOR = "\n\n"


@dataclass(frozen=True)
class Packed:
    """int64 tensors, and figures about them."""

    input_ids_NT: Tensor
    mask_NT: Tensor
    facts: dict[str, Any]


def pack(traces: Sequence[Trace], config: CalibrateConfig, tokenizer: PreTrainedTokenizerBase) -> Packed:
    """As the configuration says.  StageError for too little text, or a tokenizer that has nothing to pad with."""
    return (_crops if config.packing == "crops" else _padded)(traces, config, tokenizer)


def write(packed: Packed, facts: dict[str, Any], folder: Path) -> None:
    tensors = {"input_ids": packed.input_ids_NT, "attention_mask": packed.mask_NT}
    save_file(tensors, folder / "tokens.safetensors")
    text = json.dumps(facts, indent=2, sort_keys=True) + "\n"
    (folder / "calibration.json").write_text(text, encoding="utf-8")


def _crops(traces: Sequence[Trace], config: CalibrateConfig, tokenizer: PreTrainedTokenizerBase) -> Packed:
    """N random crops of T tokens from all texts joined and tokenized once (methods/utils/data_utils.py)."""
    text = "".join(trace.text + SEPARATOR for trace in traces)
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)
    num_starts = len(tokens) - config.sequence_length + 1
    if num_starts < config.num_sequences:
        raise StageError(
            f"too little calibration text: {len(traces)} examples give {len(tokens)} tokens, and "
            f"{config.num_sequences} different crops of {config.sequence_length} need at least "
            f"{config.sequence_length + config.num_sequences - 1}: raise the data set's num_examples, or lower "
            "sequence_length or num_sequences"
        )
    starts = random.Random(config.seed).sample(range(num_starts), config.num_sequences)
    input_ids_NT = torch.stack([tokens[start : start + config.sequence_length] for start in starts])
    facts = {"num_tokens": input_ids_NT.numel(), "num_text_tokens": len(tokens)}
    return Packed(input_ids_NT, torch.ones_like(input_ids_NT), facts)


def _padded(traces: Sequence[Trace], config: CalibrateConfig, tokenizer: PreTrainedTokenizerBase) -> Packed:
    """One example per row, cut at T tokens and padded on the right."""
    pad = tokenizer.pad_token_id
    if pad is None:
        raise StageError("the tokenizer has neither a padding nor an EOS token: set pad_token in tokenizer_config.json")
    input_ids_NT = torch.full((len(traces), config.sequence_length), int(pad), dtype=torch.int64)
    mask_NT = torch.zeros_like(input_ids_NT)
    num_cut = 0
    for row, trace in enumerate(traces):
        num_cut += len(trace.ids) > config.sequence_length
        ids = trace.ids[: config.sequence_length]
        input_ids_NT[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
        mask_NT[row, : len(ids)] = 1
    return Packed(input_ids_NT, mask_NT, {"num_tokens": int(mask_NT.sum()), "num_cut": num_cut})
