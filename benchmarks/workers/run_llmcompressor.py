"""Quantize with llm-compressor, in its own environment: run_llmcompressor.py MODEL TOKENS OUTPUT {gptq,awq}.

Asymmetric W3G64. GPTQ with static activation order; observers, damping and AWQ's search are its defaults.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

WEIGHTS = {"num_bits": 3, "type": "int", "symmetric": False, "strategy": "group", "group_size": 64}


def main(model_folder: Path, tokens: Path, output: Path, method: str) -> None:
    input_ids_NT = load_file(tokens)["input_ids"]
    rows = input_ids_NT.tolist()
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    start = time.process_time()
    oneshot(
        model=model,
        processor=tokenizer,
        dataset=data,
        recipe=_recipe(method),
        max_seq_length=input_ids_NT.shape[1],
        num_calibration_samples=len(rows),
        shuffle_calibration_samples=False,
    )
    (output / "figures.json").write_text(json.dumps({"quantize_cpu_s": time.process_time() - start}))
    save_file(_weights(model, method), output / "weights.safetensors")


def _recipe(method: str) -> list[Any]:
    scheme = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS}}, "ignore": ["lm_head"]}
    if method == "gptq":
        return [GPTQModifier(**scheme, actorder="static", dampening_frac=0.01)]
    # Version 0.14.0 pins memory in AWQ's search, which fails where there is no accelerator.
    IntermediatesCache.pin_memory = lambda *_: None
    return [AWQModifier(), QuantizationModifier(**scheme)]


@torch.no_grad()
def _weights(model: torch.nn.Module, method: str) -> dict[str, torch.Tensor]:
    """The linears' weights on their grids, and the norms, which AWQ changes."""
    weights = {name: tensor for name, tensor in model.named_parameters() if name.endswith("norm.weight")}
    for name, module in model.named_modules():
        if hasattr(module, "weight_scale"):
            # GPTQ's are on the grid already; AWQ's only where a forward pass uses them.
            weights[f"{name}.weight"] = module.weight if method == "gptq" else _rounded(module)
    return {name: tensor.detach().bfloat16().contiguous() for name, tensor in weights.items()}


def _rounded(module: torch.nn.Module) -> torch.Tensor:
    return fake_quantize(
        module.weight, module.weight_scale, module.weight_zero_point, module.quantization_scheme.weights
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*(Path(argument) for argument in sys.argv[1:4]), sys.argv[4])
