"""The start of quantization-aware training: PTQ corrects the weights before any step is taken (paper, section 4.1).

The paper starts from symmetric round-to-nearest or from asymmetric GPTQ; the defaults here are the latter, with the
settings of the PTQ study that the paper builds on (ruikangliu/Quantized-Reasoning-Models,
scripts/quantization/gptq.sh).

Departure: a Hessian that cannot be factorised is tried again with ten times the damping, up to its mean diagonal, and
the retries are recorded in ptq_report.json; then the stage fails.  The reference code's own retry is faulty.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from pydantic import Field
from safetensors import safe_open

from quant.gptq import GPTQOptions
from quant.initializers import Method, initializer
from quant.scheme import ScaleDtype, ScaleRule, Scheme
from quant.streaming import Batch, quantize_blocks
from tasks.model_folders import check_model_folder, write_json
from tasks.model_stream import CheckpointStream
from tasks.stage import Context, StageConfig, StageError, stage

REPORT = "ptq_report.json"


class PTQInitConfig(StageConfig):
    """Scheme and method of the initialisation."""

    scheme: str = "W3G128"
    symmetric: bool = False
    scale_rule: ScaleRule = "paper"
    scale_dtype: ScaleDtype = "bfloat16"
    method: str = "gptq"
    act_order: bool = True
    static_groups: bool = True
    mse_clip: bool = True
    damping: float = 0.01
    block_size: int = 128
    batch_size: int = Field(default=4, ge=1)
    """Calibration sequences that run through a block at a time: speed, memory, and the Hessian's rounding errors."""

    def parsed_scheme(self) -> Scheme:
        return Scheme.parse(
            self.scheme, symmetric=self.symmetric, scale_rule=self.scale_rule, scale_dtype=self.scale_dtype
        )

    def gptq_options(self) -> GPTQOptions:
        return GPTQOptions(self.act_order, self.static_groups, self.mse_clip, self.damping, self.block_size)


@stage(kind="checkpoint")
def ptq_init(config: PTQInitConfig, context: Context, *, base: Path, calibration: Path | None = None) -> dict[str, Any]:
    """Quantize `base` block by block and write the QAT start: dequantized weights, and latents with their grids."""
    start = time.perf_counter()
    try:
        method, scheme, options = _checked(config)
        check_model_folder(base)
        stream = CheckpointStream(base, context.scratch, scheme, context.device)
        batches = _calibration_batches(method, config, stream, calibration)
        quantize_blocks(stream, batches, method.block_method(options), scheme, _block_progress(context))
    except ValueError as error:
        raise StageError(f"ptq_init: {error}") from error
    stream.finish(context.output)
    report = stream.report()
    write_json(context.output / REPORT, report)
    return {"seconds": time.perf_counter() - start, **_metrics(report)}


def check_fits(config: PTQInitConfig, base: Path) -> None:
    """Raise StageError if the method cannot do the scheme, or a group size does not divide the model's linears.

    Reads config.json alone, so that it can be asked before any compute is spent.
    """
    try:
        _, scheme, _ = _checked(config)
        model = json.loads((base / "config.json").read_text())
        heads = model["num_attention_heads"]
        head_dim = model.get("head_dim") or model["hidden_size"] // heads
        for in_features in (model["hidden_size"], heads * head_dim, model["intermediate_size"]):
            scheme.num_groups(in_features)
    except ValueError as error:
        raise StageError(f"ptq_init: {error}") from error


def _checked(config: PTQInitConfig) -> tuple[Method, Scheme, GPTQOptions]:
    method, scheme, options = initializer(config.method), config.parsed_scheme(), config.gptq_options()
    method.check(scheme, options)
    return method, scheme, options


def _calibration_batches(
    method: Method, config: PTQInitConfig, stream: CheckpointStream, calibration: Path | None
) -> list[Batch]:
    """No batches for a method without calibration; StageError when the set is missing or does not fit the model."""
    if not method.needs_calibration:
        return []
    if calibration is None:
        raise StageError(f"method {config.method!r} needs calibration data: give the artifact of the calibrate stage")
    with safe_open(calibration / "tokens.safetensors", framework="pt") as file:
        input_ids_NT, mask_NT = file.get_tensor("input_ids"), file.get_tensor("attention_mask")
    if not mask_NT.numel() or not bool(mask_NT.any(1).all()):
        raise StageError("the calibration set is empty or holds an empty sequence; run calibrate with other data")
    if int(input_ids_NT.max()) >= stream.config.vocab_size:
        raise StageError("the calibration tokens exceed the model's vocabulary; calibrate with its own tokenizer")
    return stream.batches(input_ids_NT, mask_NT, config.batch_size)


def _block_progress(context: Context) -> Any:
    return lambda done, total, info: context.progress(done, total, "block", **info)


def _metrics(report: dict[str, dict[str, float | int]]) -> dict[str, Any]:
    """Figures for the record: the relative error of every linear, and how often damping had to grow."""
    errors = {name: float(row["error"]) for name, row in report.items()}
    return {
        "mean_error": sum(errors.values()) / len(errors),
        "max_error": max(errors.values()),
        "damping_retries": int(sum(row.get("retries", 0) for row in report.values())),
        "errors": errors,
    }
