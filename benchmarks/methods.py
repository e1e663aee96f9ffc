"""The PTQ methods of this repository side by side on a real model: divergence from bf16, perplexity, CPU time, memory.

Every method runs in a process of its own on one thread, with the same calibration tokens.  Run it from the repository
root; README.md beside this file says how to make the model.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Usage, fidelity, load_model, windows
from benchmarks.peers import LENGTH, NUM_CALIBRATION, ours, quantize
from quant.grids.scheme import Scheme
from tasks.checkpoints.models import load_model as load_checkpoint

NUM_TEST = 10


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(1)
    calibration_NT, test_NT = windows(arguments.model, arguments.text, NUM_CALIBRATION, NUM_TEST, LENGTH)
    usages: dict[str, Usage] = {}
    models = {}
    with tempfile.TemporaryDirectory() as work:
        for scheme in arguments.scheme:
            for method in arguments.method:
                name, output = f"{scheme} {method}", Path(work) / f"{scheme}-{method}"
                tool = ours(**_config(scheme, method, arguments.flatquant_epochs))
                try:
                    usages[name] = quantize(tool, Path(sys.executable), arguments.model, calibration_NT, output)
                except RuntimeError as error:
                    print(f"{name} is left out: {str(error).splitlines()[-1]}", file=sys.stderr)
                    continue
                models[name] = load_checkpoint(output, torch.bfloat16)
        found = fidelity(load_model(arguments.model), models, test_NT)
    print(f"bf16 perplexity {found['reference'].perplexity:.2f}")
    print("| scheme and method | KL | perplexity | CPU s | peak MB |\n|---|---:|---:|---:|---:|")
    for name, usage in usages.items():
        row = found[name]
        kl = f"{row.kl:.3f} ± {row.kl_error:.3f}"
        print(f"| {name} | {kl} | {row.perplexity:.2f} | {usage.cpu_s:.0f} | {usage.peak_mb:.0f} |")


def _config(scheme: str, method: str, flatquant_epochs: int) -> dict[str, Any]:
    """Asymmetric weights where they alone are quantized, symmetric ones elsewhere, as in the recipes."""
    config: dict[str, Any] = {"scheme": scheme, "method": method, "symmetric": not Scheme.parse(scheme).weight_only}
    if method == "flatquant":
        config |= {"batch_size": 1, "flatquant": {"epochs": flatquant_epochs}}
    return config


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="bf16 Hugging Face folder")
    parser.add_argument("--text", type=Path, required=True, help=".txt or .jsonl, gzipped or not")
    parser.add_argument("--scheme", nargs="+", default=["W3G64", "W4A4KV4"])
    parser.add_argument("--method", nargs="+", default=["rtn", "awq", "gptq", "quarot", "flatquant"])
    parser.add_argument("--flatquant-epochs", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
