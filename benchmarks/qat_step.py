"""A training step of a fake-quantized student beside the same step without quantization, and with torchao's QAT.

The step is forward, loss and backward (no optimizer) on 4 x 512 random tokens in bf16 autocast, with this repository's
losses throughout; the bf16 model is also the teacher of KD.  A variant and the unquantized student live in two
processes that take steps in turn, so that a change of the machine's load meets both: what counts is the ratio of each
pair.  On a CPU, one thread, seconds are those of CPU time and memory is the resident set above that of a process with
everything imported; on a GPU, wall time and what PyTorch allocated.  Run it from the repository root; README.md beside
this file tells how to add torchao.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from benchmarks.common import peak_mb
from quant.decoder import INPUT_SITES
from quant.grids.scheme import ScaleMode, Scheme
from quant.methods.flatquant import initial_sites, learnable
from quant.student.linear import prepare
from quant.student.site_tensors import build_sites
from quant.student.sites import decoder_layers
from quant.student.targets import target_linears
from tasks.training.batches import Example, collate
from tasks.training.loop import Batch
from tasks.training.objectives import KDObjective, SFTObjective

OBJECTIVES = ("sft", "kd")
BATCH, LENGTH = 4, 512
WARM_UP_STEPS = 2
"""The first step compiles the kernels of its shapes, and a virtual machine is given the memory of its peak."""
Quantize = Callable[[PreTrainedModel], None]
"""Gives the model, whose parameters are frozen, the variant's linears with trainable fp32 weights, in place."""


@dataclass(frozen=True)
class Comparison:
    """A variant's steps, each with the unquantized one that came just before it."""

    objective: str
    variant: str
    seconds: list[tuple[float, float]]
    """(unquantized, variant) of each pair."""
    peak_mb: tuple[float, float]
    """(unquantized, variant), 10^6 bytes."""


def unquantized(model: PreTrainedModel) -> None:
    for linear in target_linears(model).values():
        linear.weight = nn.Parameter(linear.weight.detach().float())


def rounded(model: PreTrainedModel, scheme: Scheme, scale_mode: ScaleMode) -> None:
    """Rounded to nearest, with the scheme's quantizers of activations and caches."""
    prepare(model, scheme, None, scale_mode, build_sites({}, scheme, decoder_layers(model), learned=False))


def transformed(model: PreTrainedModel, scheme: Scheme) -> None:
    """With FlatQuant's transforms and clips, as they are before they have learned anything."""
    for layer in decoder_layers(model).values():
        weights = {site: layer.get_parameter(f"{linears[0]}.weight") for site, linears in INPUT_SITES.items()}
        max_inputs = {site: torch.ones(w_OI.shape[1], device=w_OI.device) for site, w_OI in weights.items()}
        learnable(layer, scheme, initial_sites(layer, scheme, max_inputs, seed=0))


def torchao(model: PreTrainedModel) -> None:
    """torchao's W3G64, asymmetric; it takes the range of the weights in every forward pass."""
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    unquantized(model)
    weight = IntxFakeQuantizeConfig(torch.int3, group_size=64, is_symmetric=False)  # type: ignore[attr-defined]
    quantize_(model.get_decoder(), QATConfig(weight_config=weight, step="prepare"))


W3G64, W4A4KV4 = Scheme.parse("W3G64", symmetric=False), Scheme.parse("W4A4KV4")
VARIANTS: dict[str, Quantize] = {
    "W3G64": partial(rounded, scheme=W3G64, scale_mode="frozen"),
    "W3G64 torchao": torchao,
    "W4A4KV4": partial(rounded, scheme=W4A4KV4, scale_mode="recomputed"),
    "W4A4KV4 FlatQuant": partial(transformed, scheme=W4A4KV4),
}


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    variants = arguments.variants
    if find_spec("torchao") is None and "W3G64 torchao" in variants:
        print("torchao is left out: it is not installed", file=sys.stderr)
        variants = [name for name in variants if name != "W3G64 torchao"]
    comparisons = []
    for objective, variant in itertools.product(arguments.objectives, variants):
        comparisons.append(compare(arguments.model, objective, variant, arguments.device, arguments.pairs))
        print(comparisons[-1], file=sys.stderr)
    print(_table(comparisons))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="bf16 Hugging Face folder")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--pairs", type=int, default=7, help="of steps that are timed")
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=OBJECTIVES)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    return parser.parse_args()


def compare(folder: Path, objective: str, variant: str, device: str, num_pairs: int) -> Comparison:
    """Warm both students up, then take turns."""
    with ExitStack() as stack:
        students = [
            stack.enter_context(_process(folder, objective, make, device)) for make in (unquantized, VARIANTS[variant])
        ]
        pairs = [
            tuple(student.submit(_timed_step).result() for student in students)
            for _ in range(WARM_UP_STEPS + num_pairs)
        ]
        peaks = tuple(student.submit(_peak_mb).result() for student in students)
    return Comparison(objective, variant, pairs[WARM_UP_STEPS:], peaks)


def _process(folder: Path, objective: str, quantize: Quantize, device: str) -> ProcessPoolExecutor:
    """A process that holds one student; forked, so that imports are paid for once. CUDA is only touched in it."""
    context = multiprocessing.get_context("fork")
    return ProcessPoolExecutor(1, context, initializer=_hold_student, initargs=(folder, objective, quantize, device))


@dataclass(frozen=True)
class Held:
    """What a process holds."""

    objective: nn.Module
    batch: Batch
    device: str
    before_mb: float


_held: Held


def _hold_student(folder: Path, objective: str, quantize: Quantize, device: str) -> None:
    global _held
    before_mb = _memory_mb(device)
    student = _load(folder, device)
    student.requires_grad_(False)
    quantize(student)
    module = SFTObjective(student) if objective == "sft" else KDObjective(student, _load(folder, device))
    _held = Held(module, _random_batch(student), device, before_mb)


def _timed_step() -> float:
    """Seconds of a step."""
    _held.objective.zero_grad()
    start = _clock(_held.device)
    with torch.autocast(_held.device, torch.bfloat16):
        loss, _ = _held.objective(_held.batch)
    (loss / len(_held.batch["targets"])).backward()
    return _clock(_held.device) - start


def _peak_mb() -> float:
    return _memory_mb(_held.device) - _held.before_mb


def _load(folder: Path, device: str) -> PreTrainedModel:
    """The bf16 model with the attention that is faster in bf16: on a CPU the eager one."""
    attention = "eager" if device == "cpu" else "sdpa"
    model = AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, dtype=torch.bfloat16, attn_implementation=attention
    )
    return model.to(device)  # type: ignore[arg-type]


def _random_batch(model: PreTrainedModel) -> Batch:
    generator = torch.Generator().manual_seed(0)
    ids_NT = torch.randint(model.config.vocab_size, (BATCH, LENGTH), generator=generator, dtype=torch.int32)
    batch = collate([Example(row, ids_T, start=1) for row, ids_T in enumerate(ids_NT)])
    return {name: tensor.to(model.device) for name, tensor in batch.items()}


def _clock(device: str) -> float:
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def _memory_mb(device: str) -> float:
    """The largest so far."""
    if device == "cpu":
        return peak_mb(os.getpid())
    return torch.cuda.max_memory_allocated() / 1e6


def _table(comparisons: list[Comparison]) -> str:
    """Medians over the pairs; of the ratios too, with least and largest."""
    header = ["objective", "variant", "s", "s unquantized", "ratio", "peak MB", "peak MB unquantized"]
    rows = [header, ["---"] * 2 + ["---:"] * 5]
    for found in comparisons:
        ratios = sorted(own / baseline for baseline, own in found.seconds)
        baseline_s, own_s = (median(column) for column in zip(*found.seconds, strict=True))
        ratio = f"{median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        baseline_mb, own_mb = found.peak_mb
        row = [found.objective.upper(), found.variant, f"{own_s:.1f}", f"{baseline_s:.1f}", ratio]
        rows.append([*row, f"{own_mb:,.0f}", f"{baseline_mb:,.0f}"])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


if __name__ == "__main__":
    main()
