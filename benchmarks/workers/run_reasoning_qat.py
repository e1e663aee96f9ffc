"""Quantize with this repository's `ptq_init` stage: run_reasoning_qat.py MODEL TOKENS OUTPUT CONFIG.

CONFIG is a PTQInitConfig as JSON.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tasks.ptq_init import PTQInitConfig, ptq_init
from tasks.runtime.stage import Context


def main(model: Path, tokens: Path, output: Path, config: PTQInitConfig) -> None:
    input_ids_NT = load_file(tokens)["input_ids"]
    calibration, scratch = output / "calibration", output / "scratch"
    for folder in (calibration, scratch):
        folder.mkdir()
    masked = {"input_ids": input_ids_NT, "attention_mask": torch.ones_like(input_ids_NT)}
    save_file(masked, calibration / "tokens.safetensors")
    start = time.process_time()
    ptq_init(config, Context(output, scratch), base=model, calibration=calibration)
    (output / "figures.json").write_text(json.dumps({"quantize_cpu_s": time.process_time() - start}))
    shutil.rmtree(scratch)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*map(Path, sys.argv[1:4]), PTQInitConfig.model_validate_json(sys.argv[4]))
