"""What every PTQ benchmark shares: text windows, a measured child process, and the divergence from the bf16 model.

Dimensions: N windows, T tokens, V vocabulary.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

JSONL_FIELDS = ("question", "answer", "text")
POLL_SECONDS = 0.05
"""Between two looks at a child's memory."""
TOKENS_AT_A_TIME = 64
"""Of which log-probabilities over the vocabulary are in memory."""


@dataclass(frozen=True)
class Usage:
    """What a child process took from its start to its end."""

    cpu_s: float
    """User and system time of all its threads."""
    peak_mb: float
    """Largest resident set, 10^6 bytes."""


@dataclass(frozen=True)
class Fidelity:
    """A model beside the bf16 one on the same windows."""

    kl: float
    """Mean forward KL(bf16 || model) in nats per token."""
    kl_error: float
    """Its standard error over windows."""
    perplexity: float


def read_text(path: Path) -> str:
    """The text of a .txt or .jsonl file, gzipped or not; of JSON lines the fields `question`, `answer` and `text`."""
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        if ".jsonl" not in path.suffixes:
            return file.read()
        rows = [json.loads(line) for line in file]
    return "\n\n".join("\n".join(row[field] for field in JSONL_FIELDS if field in row) for row in rows)


def windows(model: Path, text: Path, num_calibration: int, num_test: int, length: int) -> tuple[Tensor, Tensor]:
    """(calibration_NT, test_NT): consecutive windows from the beginning and from the end of the tokenized text.

    Raises ValueError when the text is too short for them not to overlap.
    """
    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    tokens = torch.tensor(tokenizer(read_text(text), add_special_tokens=False, verbose=False)["input_ids"])
    needed = (num_calibration + num_test) * length
    if len(tokens) < needed:
        raise ValueError(f"{text} has {len(tokens)} tokens and {needed} are needed: give a longer text")
    return tokens[: num_calibration * length].view(-1, length), tokens[-num_test * length :].view(-1, length)


def run_measured(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> Usage:
    """Run a child process to its end, its output in `log`; RuntimeError with the end of the log if it fails.

    What it takes in its last POLL_SECONDS only may be missing from its peak.
    """
    with log.open("wb") as output:
        child = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, **environment})
        peak, ended = 0.0, 0
        while not ended:
            peak = max(peak, peak_mb(child.pid))
            ended, status, usage = os.wait4(child.pid, os.WNOHANG)
            time.sleep(POLL_SECONDS)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        end = log.read_text(errors="replace")[-2000:]
        raise RuntimeError(f"{' '.join(command)} exited with {child.returncode}:\n{end}")
    return Usage(usage.ru_utime + usage.ru_stime, peak)


def peak_mb(process: int) -> float:
    """Largest resident set so far of a running process, 10^6 bytes; 0 once it has ended.

    Not ru_maxrss, which Linux hands on from the process that starts another: it is never below the benchmark's own.
    """
    with open(f"/proc/{process}/status") as file:
        return next((int(line.split()[1]) * 1024 / 1e6 for line in file if line.startswith("VmHWM")), 0.0)


def load_model(folder: Path, weights: Path | None = None) -> nn.Module:
    """The bf16 model in `folder`, with the tensors of all safetensors files in `weights` put over its own."""
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.bfloat16).eval()
    parameters = dict(model.named_parameters())
    for path in sorted(weights.glob("*.safetensors")) if weights else []:
        with safe_open(path, framework="pt") as file, torch.no_grad():
            for name in file.keys():  # noqa: SIM118 (a safetensors handle is no dict)
                parameters[name].copy_(file.get_tensor(name))
    return model


@torch.no_grad()
def fidelity(reference: nn.Module, models: Mapping[str, nn.Module], test_NT: Tensor) -> dict[str, Fidelity]:
    """Compare every model with `reference` window by window; log-probabilities are in fp32.

    The reference is among the results, as "reference", with its perplexity and no divergence.
    """
    compared = {"reference": reference, **models}
    rows: dict[str, list[tuple[float, float]]] = {name: [] for name in compared}
    for ids_1T in test_NT.split(1):
        reference_TV = _logits(reference, ids_1T)
        for name, model in compared.items():
            logits_TV = reference_TV if model is reference else _logits(model, ids_1T)
            rows[name].append(_kl_and_surprise(reference_TV, logits_TV, ids_1T[0]))
    return {name: _summary(torch.tensor(row, dtype=torch.float64)) for name, row in rows.items()}


def _logits(model: nn.Module, ids_1T: Tensor) -> Tensor:
    return model(ids_1T, use_cache=False).logits[0]


def _kl_and_surprise(reference_TV: Tensor, logits_TV: Tensor, ids_T: Tensor) -> tuple[float, float]:
    """Means over the tokens that have a next one, of the divergence and of the next token's surprise, in nats."""
    kl = surprise = 0.0
    for token in range(0, len(ids_T) - 1, TOKENS_AT_A_TIME):
        some = slice(token, min(token + TOKENS_AT_A_TIME, len(ids_T) - 1))
        reference_CV, log_probs_CV = (logits[some].float().log_softmax(-1) for logits in (reference_TV, logits_TV))
        kl += float((reference_CV.exp() * (reference_CV - log_probs_CV)).sum())
        surprise -= float(log_probs_CV.gather(-1, ids_T[some.start + 1 : some.stop + 1, None]).sum())
    return kl / (len(ids_T) - 1), surprise / (len(ids_T) - 1)


def _summary(kl_and_surprise_N2: Tensor) -> Fidelity:
    kl, surprise = kl_and_surprise_N2.mean(0).tolist()
    kl_error = float(kl_and_surprise_N2[:, 0].std() / len(kl_and_surprise_N2) ** 0.5)
    return Fidelity(kl, kl_error, math.exp(surprise))
