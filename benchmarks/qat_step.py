"""A training step of a fake-quantized student beside the same step without quantization, and with torchao's QAT.

The step is forward, loss and backward (no optimizer) on 4 x 512 random tokens in bf16 autocast, with this repository's
losses throughout; the bf16 model is also the teacher of KD.  Every measurement is a process of its own, and the
variants take turns, so that a change of the machine's load meets all of them.  On a CPU, one thread, seconds are those
of CPU time and memory is the resident set above that of a process with everything imported; on a GPU, wall time and
what PyTorch allocated.  Run it from the repository root; README.md beside this file tells how to add torchao.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
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
from quant.flatquant import initial_sites, learnable
from quant.linear import ScaleMode, prepare
from quant.scheme import Scheme
from quant.site_tensors import build_sites
from quant.sites import INPUT_SITES, decoder_layers
from quant.targets import target_linears
from tasks.training.batches import Example, collate
from tasks.training.loop import Batch
from tasks.training.objectives import KDObjective, SFTObjective

OBJECTIVES = ("sft", "kd")
BATCH, LENGTH = 4, 512
WARM_UP_STEPS, TIMED_STEPS = 2, 3
"""The first step compiles the kernels of its shapes, and a virtual machine is given the memory of its peak."""
Quantize = Callable[[PreTrainedModel], None]
"""Gives the model, whose parameters are frozen, the variant's linears with trainable fp32 weights, in place."""


@dataclass(frozen=True)
class Measurement:
    objective: str
    variant: str
    seconds: float
    peak_mb: float
    """10^6 bytes."""


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
BASELINE = "unquantized"
VARIANTS: dict[str, Quantize] = {
    BASELINE: unquantized,
    "W3G64": partial(rounded, scheme=W3G64, scale_mode="frozen"),
    "W3G64 torchao": torchao,
    "W4A4KV4": partial(rounded, scheme=W4A4KV4, scale_mode="recomputed"),
    "W4A4KV4 FlatQuant": partial(transformed, scheme=W4A4KV4),
}


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    variants = [BASELINE, *(name for name in arguments.variants if name != BASELINE)]
    if find_spec("torchao") is None and "W3G64 torchao" in variants:
        print("torchao is left out: it is not installed", file=sys.stderr)
        variants.remove("W3G64 torchao")
    print(_table(list(_measurements(arguments, variants))))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="bf16 Hugging Face folder")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=OBJECTIVES)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="beside unquantized")
    return parser.parse_args()


def _measurements(arguments: argparse.Namespace, variants: list[str]) -> Iterator[Measurement]:
    # Forked, so that imports are paid for once; CUDA is only touched in the children.
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        for _ in range(arguments.repeats):
            for objective in arguments.objectives:
                for variant in variants:
                    found = pool.apply(measure, (arguments.model, objective, variant, arguments.device))
                    print(found, file=sys.stderr)
                    yield found


def measure(folder: Path, objective: str, variant: str, device: str) -> Measurement:
    """Make a student, warm up, and take the quickest of TIMED_STEPS: what disturbs a step only makes it longer."""
    before_mb = _peak_mb(device)
    student = _load(folder, device)
    student.requires_grad_(False)
    VARIANTS[variant](student)
    module = SFTObjective(student) if objective == "sft" else KDObjective(student, _load(folder, device))
    batch = _random_batch(student)
    seconds = [_timed_step(module, batch, device) for _ in range(WARM_UP_STEPS + TIMED_STEPS)]
    return Measurement(objective, variant, min(seconds[WARM_UP_STEPS:]), _peak_mb(device) - before_mb)


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


def _timed_step(objective: nn.Module, batch: Batch, device: str) -> float:
    objective.zero_grad()
    start = _clock(device)
    with torch.autocast(device, torch.bfloat16):
        loss, _ = objective(batch)
    (loss / len(batch["targets"])).backward()
    return _clock(device) - start


def _clock(device: str) -> float:
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def _peak_mb(device: str) -> float:
    if device == "cpu":
        return peak_mb(os.getpid())
    return torch.cuda.max_memory_allocated() / 1e6


def _table(measurements: list[Measurement]) -> str:
    """Medians over the repeats; of the ratios too, each to the unquantized step of its turn, with least and largest."""
    found: dict[tuple[str, str], list[Measurement]] = {}
    for measurement in measurements:
        found.setdefault((measurement.objective, measurement.variant), []).append(measurement)
    rows = [["objective", "variant", "s", "s / unquantized", "peak MB"], ["---", "---", "---:", "---:", "---:"]]
    for (objective, variant), repeats in found.items():
        pairs = zip(repeats, found[objective, BASELINE], strict=True)
        ratios = sorted(own.seconds / baseline.seconds for own, baseline in pairs)
        seconds, peak_mb = median(row.seconds for row in repeats), median(row.peak_mb for row in repeats)
        ratio = f"{median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        rows.append([objective.upper(), variant, f"{seconds:.1f}", ratio, f"{peak_mb:.0f}"])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


if __name__ == "__main__":
    main()
