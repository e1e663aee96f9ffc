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
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator
from safetensors import safe_open

from quant.calibration.activations import Keep, in_memory, on_disk
from quant.calibration.streaming import Batch, BlockMethod, quantize_blocks
from quant.grids.scheme import ScaleDtype, ScaleRule, Scheme
from quant.methods.options import AWQOptions, FlatQuantOptions, GPTQOptions, QuaRotOptions
from quant.methods.registry import METHODS, Method, initializer
from quant.methods.rewrite import DecoderShape
from tasks.checkpoints.folders import check_model_folder, write_json
from tasks.checkpoints.stream import CheckpointStream
from tasks.runtime.stage import Context, StageConfig, StageError, stage

REPORT = "ptq_report.json"


class PTQInitConfig(StageConfig):
    """Scheme and method of the initialisation."""

    scheme: str = "W3G128"
    symmetric: bool = False
    scale_rule: ScaleRule = "paper"
    scale_dtype: ScaleDtype = "bfloat16"
    method: str = "gptq"
    gptq: GPTQOptions | None = None
    """Options of the method of that name, None for its defaults; those of other methods must be left out."""
    awq: AWQOptions | None = None
    quarot: QuaRotOptions | None = None
    flatquant: FlatQuantOptions | None = None
    batch_size: int = Field(default=4, ge=1)
    """Calibration sequences that run through a block at a time: speed, memory, and the Hessian's rounding errors.
    FlatQuant takes a step per batch."""
    activations: Literal["memory", "disk"] = "memory"
    """Where the calibration set's activations wait between two blocks; disk is the stage's scratch folder."""

    unkeyed_fields: ClassVar[tuple[str, ...]] = ("activations",)

    def parsed_scheme(self) -> Scheme:
        return Scheme.parse(
            self.scheme, symmetric=self.symmetric, scale_rule=self.scale_rule, scale_dtype=self.scale_dtype
        )

    def parsed_method(self) -> tuple[Method[Any], Any]:
        """The method and its options."""
        method = initializer(self.method)
        return method, getattr(self, self.method, None) or method.options()

    @model_validator(mode="after")
    def _no_options_of_other_methods(self) -> PTQInitConfig:
        for name in METHODS:
            if name != self.method and getattr(self, name, None) is not None:
                raise ValueError(
                    f"{name} holds options of another method than {self.method!r}: leave it out, or set it only on "
                    f"branches whose method is {name!r}"
                )
        return self


@stage(
    kind="checkpoint",
    reads={"base": "base", "calibration": "calibration"},
    gives=("student", "model"),
    packages=lambda config: ("torch", "transformers"),
)
def ptq_init(config: PTQInitConfig, context: Context, *, base: Path, calibration: Path | None = None) -> dict[str, Any]:
    """Quantize `base` block by block and write the QAT start: dequantized weights, and latents with their grids."""
    start = time.perf_counter()
    try:
        method, scheme = _checked(config)
        check_model_folder(base)
        stream = CheckpointStream(base, context.scratch, scheme, context.device, method.rewrite)
        keep = on_disk(context.scratch / "activations") if config.activations == "disk" else in_memory
        batches = _calibration_batches(method, config, stream, calibration, keep)
        quantize_blocks(stream, batches, method, scheme, _block_progress(context))
    except ValueError as error:
        raise StageError(f"ptq_init: {error}") from error
    stream.finish(context.output, method.learned_transforms)
    report = stream.report()
    write_json(context.output / REPORT, report)
    return {"seconds": time.perf_counter() - start, **_metrics(report)}


def check_fits(config: PTQInitConfig, base: Path) -> None:
    """Raise StageError if the method cannot do the scheme or the model's sizes, or a group size does not divide them.

    Reads config.json alone, so that it can be asked before any compute is spent.
    """
    try:
        method, scheme = _checked(config)
        shape = DecoderShape.from_config(json.loads((base / "config.json").read_text()))
        for in_features in shape.in_features:
            scheme.num_groups(in_features)
        if method.rewrite is not None:
            method.rewrite(shape, scheme)
    except ValueError as error:
        raise StageError(f"ptq_init: {error}") from error


def _checked(config: PTQInitConfig) -> tuple[BlockMethod, Scheme]:
    (method, options), scheme = config.parsed_method(), config.parsed_scheme()
    method.check(options, scheme)
    return method.block_method(options), scheme


def _calibration_batches(
    method: BlockMethod, config: PTQInitConfig, stream: CheckpointStream, calibration: Path | None, keep: Keep
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
    return stream.batches(input_ids_NT, mask_NT, config.batch_size, keep)


def _block_progress(context: Context) -> Any:
    return lambda done, total, info: context.progress(done, total, "block", **info)


def _metrics(report: dict[str, dict[str, float | int]]) -> dict[str, Any]:
    """Figures for the record: every linear's relative error, and the most tries that one needed beyond the first."""
    errors = {name: float(row["error"]) for name, row in report.items()}
    return {
        "mean_error": sum(errors.values()) / len(errors),
        "max_error": max(errors.values()),
        "max_retries": max(row.get("retries", 0) for row in report.values()),
        "errors": errors,
    }
