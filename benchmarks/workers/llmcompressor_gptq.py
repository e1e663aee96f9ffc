"""Quantize with llm-compressor's GPTQ, in its own environment: llmcompressor_gptq.py MODEL TOKENS OUTPUT.

Asymmetric W3G64, static activation order, the observer and the damping that are its defaults.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

WEIGHTS = {"num_bits": 3, "type": "int", "symmetric": False, "strategy": "group", "group_size": 64}


def main(model_folder: Path, tokens: Path, output: Path) -> None:
    input_ids_NT = load_file(tokens)["input_ids"]
    rows = input_ids_NT.tolist()
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    groups = {"group_0": {"targets": ["Linear"], "weights": WEIGHTS}}
    recipe = GPTQModifier(config_groups=groups, ignore=["lm_head"], actorder="static", dampening_frac=0.01)
    start = time.process_time()
    oneshot(
        model=model,
        processor=tokenizer,
        dataset=data,
        recipe=recipe,
        max_seq_length=input_ids_NT.shape[1],
        num_calibration_samples=len(rows),
        shuffle_calibration_samples=False,
    )
    (output / "figures.json").write_text(json.dumps({"quantize_cpu_s": time.process_time() - start}))
    # Its weights are already those on the grid.
    linears = {name: module for name, module in model.named_modules() if hasattr(module, "weight_scale")}
    save_file(
        {f"{name}.weight": module.weight.detach().bfloat16().contiguous() for name, module in linears.items()},
        output / "weights.safetensors",
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*(Path(argument) for argument in sys.argv[1:4]))
