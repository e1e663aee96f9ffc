"""Quantize with gptqmodel, in its own environment: run_gptqmodel.py MODEL TOKENS OUTPUT.

Asymmetric W3G64 with its default order of columns (group-aware) and its default damping.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from safetensors.torch import load_file, save_file


def main(model_folder: Path, tokens: Path, output: Path) -> None:
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in load_file(tokens)["input_ids"].tolist()]
    # The second format holds zeros as they are, the first holds them less one.
    config = QuantizeConfig(bits=3, group_size=64, sym=False, format="gptq_v2", device="cpu", offload_to_disk=False)
    model = GPTQModel.load(str(model_folder), config, backend=BACKEND.TORCH, trust_remote_code=False)
    start = time.process_time()
    model.quantize(rows, batch_size=1, backend=BACKEND.TORCH)
    (output / "figures.json").write_text(json.dumps({"quantize_cpu_s": time.process_time() - start}))
    weights = {}
    for name, module in model.model.named_modules():
        if hasattr(module, "qweight"):
            weights[f"{name}.weight"] = module.dequantize_weight().T.to(torch.bfloat16).contiguous()
    save_file(weights, output / "weights.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*(Path(argument) for argument in sys.argv[1:4]))
