"""GPTQ and AWQ at W3G64, asymmetric: this repository beside llm-compressor and gptqmodel.

Every tool gets the same bf16 model and the same calibration tokens, runs in a process of its own on one thread, and
hands back dequantized bf16 weights, which are compared with the bf16 model on held-out windows of every text.  Run it
from the repository root; README.md beside this file says how to make the model and the tools' environments.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.common import Fidelity, Usage, fidelity, load_model, run_measured, windows

WORKERS = Path(__file__).parent / "workers"
NUM_CALIBRATION, NUM_TEST, LENGTH = 64, 40, 512
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": str(WORKERS.parent.parent),  # for this repository's own worker
    "GPTQMODEL_CPU_WORKERS": "2",  # it refuses fewer
}


@dataclass(frozen=True)
class Tool:
    """How one tool is run."""

    method: str
    worker: str
    arguments: tuple[str, ...] = ()
    environment: str | None = None
    """Folder of its virtual environment under --peers; None for this repository's own."""

    def interpreter(self, peers: Path | None) -> Path | None:
        """Its Python, or None where the environment is not there."""
        if self.environment is None:
            return Path(sys.executable)
        path = peers / self.environment / "bin" / "python" if peers else None
        return path if path and path.is_file() else None


def ours(**config: Any) -> Tool:
    """This repository with a PTQInitConfig of these values."""
    return Tool(config["method"], "run_reasoning_qat.py", (json.dumps(config),))


OURS = "reasoning-qat"
TOOLS = {
    f"{OURS} RTN": ours(scheme="W3G64", method="rtn", symmetric=False),
    f"{OURS} GPTQ": ours(scheme="W3G64", method="gptq", symmetric=False),
    "llm-compressor GPTQ": Tool("gptq", "run_llmcompressor.py", ("gptq",), environment="llmcompressor"),
    "gptqmodel GPTQ": Tool("gptq", "run_gptqmodel.py", environment="gptqmodel"),
    f"{OURS} AWQ": ours(scheme="W3G64", method="awq", symmetric=False),
    "llm-compressor AWQ": Tool("awq", "run_llmcompressor.py", ("awq",), environment="llmcompressor"),
}


@dataclass(frozen=True)
class Run:
    """One tool calibrated on one text."""

    tool: str
    calibration: str
    usage: Usage
    quantize_cpu_s: float
    """CPU time of quantizing alone: without imports and, except for this repository, reading and writing the model."""
    fidelity: dict[str, Fidelity]
    """By the text it is tested on."""


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(1)
    texts = {path.parent.name: path for path in arguments.text}
    data = {name: windows(arguments.model, path, NUM_CALIBRATION, NUM_TEST, LENGTH) for name, path in texts.items()}
    interpreters = {name: TOOLS[name].interpreter(arguments.peers) for name in arguments.tools}
    runs = []
    with tempfile.TemporaryDirectory() as work:
        for text, (calibration_NT, _) in data.items():
            for name, interpreter in interpreters.items():
                if interpreter is None:
                    print(f"{name} is left out: no environment {TOOLS[name].environment!r} in --peers", file=sys.stderr)
                    continue
                output = Path(work) / f"{text}-{name.replace(' ', '-')}"
                usage = quantize(TOOLS[name], interpreter, arguments.model, calibration_NT, output)
                runs.append((name, text, usage, output))
                print(f"{name} on {text}: {usage.cpu_s:.0f} CPU s, {usage.peak_mb:.0f} MB", file=sys.stderr)
        print(_table(_compared(arguments.model, runs, {text: test_NT for text, (_, test_NT) in data.items()})))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="bf16 Hugging Face folder")
    parser.add_argument("--text", type=Path, nargs="+", required=True, help=".txt or .jsonl, gzipped or not; its name "
                        "in the table is that of its folder")  # fmt: skip
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS), metavar="TOOL",
                        help=f"any of: {', '.join(map(repr, TOOLS))}")  # fmt: skip
    parser.add_argument("--peers", type=Path, help="folder of the virtual environments llmcompressor and gptqmodel")
    return parser.parse_args()


def quantize(tool: Tool, interpreter: Path, model: Path, calibration_NT: Tensor, output: Path) -> Usage:
    """Run a tool in a process of its own; its weights and figures.json are in `output` afterwards."""
    output.mkdir()
    tokens = output / "tokens"
    save_file({"input_ids": calibration_NT.contiguous()}, tokens)
    command = [interpreter, WORKERS / tool.worker, model, tokens, output, *tool.arguments]
    return run_measured(list(map(str, command)), output / "log.txt", ENVIRONMENT)


def _compared(model: Path, runs: list[tuple[str, str, Usage, Path]], tests: dict[str, Tensor]) -> list[Run]:
    reference = load_model(model)
    models = {str(output): load_model(model, output) for *_, output in runs}
    results = {text: fidelity(reference, models, test_NT) for text, test_NT in tests.items()}
    for text, found in results.items():
        print(f"bf16 perplexity on {text}: {found['reference'].perplexity:.2f}", file=sys.stderr)
    return [
        Run(name, text, usage, json.loads((output / "figures.json").read_text())["quantize_cpu_s"],
            {test: results[test][str(output)] for test in tests})
        for name, text, usage, output in runs
    ]  # fmt: skip


def _table(runs: list[Run]) -> str:
    tests = list(runs[0].fidelity)
    header = ["tool", "calibrated on", "CPU s", "of it quantizing", "CPU s / ours", "peak MB"]
    header += [f"KL {test}" for test in tests] + [f"perplexity {test}" for test in tests]
    rows = [header, ["---"] * 2 + ["---:"] * (len(header) - 2)]
    own_cpu_s = {_setting(run): run.usage.cpu_s for run in runs if run.tool.startswith(OURS)}
    for run in runs:
        found = [run.fidelity[test] for test in tests]
        rows.append(
            [run.tool, run.calibration, f"{run.usage.cpu_s:.0f}", f"{run.quantize_cpu_s:.0f}"]
            + [_ratio(run, own_cpu_s), f"{run.usage.peak_mb:.0f}"]
            + [f"{row.kl:.3f} ± {row.kl_error:.3f}" for row in found]
            + [f"{row.perplexity:.2f}" for row in found]
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _setting(run: Run) -> tuple[str, str]:
    """What runs have in common whose times are compared: method and calibration text."""
    return TOOLS[run.tool].method, run.calibration


def _ratio(run: Run, own_cpu_s: dict[tuple[str, str], float]) -> str:
    """Its CPU time to ours by the same method, if that was run."""
    own = own_cpu_s.get(_setting(run))
    return f"{run.usage.cpu_s / own:.2f}" if own else ""


if __name__ == "__main__":
    main()
