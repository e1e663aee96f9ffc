"""A folder's model without its weights: what transformers makes of the configuration, checked against the files."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from quant.decoder import HEAD
from tasks.checkpoints.files import FETCH, refused
from tasks.checkpoints.folders import CONFIG, QUANT_METHOD, ModelFolder, quant_method
from tasks.data.wording import first_line, listed

# Buffers that old checkpoints hold and transformers computes.
_COMPUTED = ".rotary_emb.inv_freq"


def load_config(folder: ModelFolder) -> PretrainedConfig:
    """transformers' reading of config.json; StageError where it has none."""
    try:
        config = AutoConfig.from_pretrained(folder.path, local_files_only=True, trust_remote_code=False)
        if quant_method(folder.config) == QUANT_METHOD:
            del config.quantization_config
        config.dtype = getattr(torch, folder.dtype)
    except Exception as error:  # whatever a library makes of a user's file is that file's fault
        raise refused(folder.path / CONFIG, f"transformers cannot read it ({first_line(error)})", FETCH) from error
    return config


def skeleton(folder: ModelFolder, config: PretrainedConfig) -> PreTrainedModel:
    """The model on the meta device; StageError if it cannot be built, or the files hold other tensors than it has."""
    file = folder.path / CONFIG
    try:
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config, dtype=config.dtype, attn_implementation="sdpa")
        rotary = type(model.model.rotary_emb)(config=config)
        positions = bool(rotary.inv_freq.isfinite().all()) and bool((rotary.inv_freq >= 0).all())
    except Exception as error:
        raise refused(file, f"no model can be built from it ({first_line(error)})", FETCH) from error
    if not positions:
        raise refused(file, "its rope parameters give frequencies that are no positive numbers", FETCH)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: info.shape for name, info in folder.tensors.items() if not name.endswith(_COMPUTED)}
    optional = {HEAD} if config.tie_word_embeddings else set()
    wrong = {
        "missing": expected.keys() - found.keys() - optional,
        "unexpected": found.keys() - expected.keys(),
        "of another shape": {name for name in expected.keys() & found.keys() if expected[name] != found[name]},
    }
    if any(wrong.values()):
        details = "; ".join(f"{kind}: {listed(sorted(names), 60)}" for kind, names in wrong.items() if names)
        raise refused(folder.path, f"the weights do not fit its {CONFIG} ({details})", "fetch the checkpoint anew")
    return model
