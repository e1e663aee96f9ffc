"""The start of quantization-aware training: PTQ corrects the weights before any step is taken (paper, section 4.1).

The paper starts from symmetric round-to-nearest or from asymmetric GPTQ; the defaults here are the latter, with the
settings of the PTQ study that the paper builds on (ruikangliu/Quantized-Reasoning-Models,
scripts/quantization/gptq.sh).

Departure: a Hessian that cannot be factorised is tried again with ten times the damping, up to its mean diagonal, and
the retries are recorded in ptq_report.json; then the stage fails.  The reference code's own retry is faulty.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from quant.decoder import DecoderShape
from quant.grids.scheme import ScaleDtype, ScaleRule, Scheme
from quant.methods.options import AWQOptions, FlatQuantOptions, GPTQOptions, MethodOptions, QuaRotOptions
from quant.methods.registry import METHODS, Method, initializer
from tasks.runtime.bounds import Count
from tasks.runtime.stage import Context, StageConfig, StageError, stage


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
    batch_size: Annotated[Count, Field(le=2**16)] = 4
    """Calibration sequences that run through a block at a time: speed, memory, and the Hessian's rounding errors.
    FlatQuant takes a step per batch."""
    activations: Literal["memory", "disk"] = "memory"
    """Where the calibration set's activations wait between two blocks; disk is the stage's scratch folder."""

    unkeyed_fields: ClassVar[tuple[str, ...]] = ("activations",)

    def parsed_scheme(self) -> Scheme:
        return Scheme.parse(
            self.scheme, symmetric=self.symmetric, scale_rule=self.scale_rule, scale_dtype=self.scale_dtype
        )

    def parsed_method(self) -> tuple[Method[Any], MethodOptions]:
        """The method and its options."""
        method = initializer(self.method)
        return method, getattr(self, self.method, None) or method.options()

    @field_validator("method")
    @classmethod
    def _known_method(cls, name: str) -> str:
        initializer(name)
        return name

    @field_validator("scheme")
    @classmethod
    def _known_scheme(cls, name: str) -> str:
        Scheme.parse(name)
        return name

    @model_validator(mode="after")
    def _fits_together(self) -> PTQInitConfig:
        for name in METHODS:
            if name != self.method and getattr(self, name, None) is not None:
                raise ValueError(
                    f"{name} holds options of another method than {self.method!r}: leave it out, or set it only on "
                    f"branches whose method is {name!r}"
                )
        method, options = self.parsed_method()
        method.check(options, self.parsed_scheme())
        return self


@stage(
    kind="checkpoint",
    reads={"base": "base", "calibration": "calibration"},
    gives=("student", "model"),
    packages=lambda config: ("torch", "transformers"),
    chooses=lambda config: {"quant.methods.registry:METHODS": config.method},
)
def ptq_init(config: PTQInitConfig, context: Context, *, base: Path, calibration: Path | None = None) -> dict[str, Any]:
    """Quantize `base` block by block and write the QAT start: dequantized weights, and latents with their grids."""
    from tasks.checkpoints.quantize import quantize_checkpoint

    start = time.perf_counter()
    method, options = config.parsed_method()
    try:
        report = quantize_checkpoint(
            base,
            method.block_method(options),
            config.parsed_scheme(),
            context,
            calibration=calibration,
            batch_size=config.batch_size,
            activations_on_disk=config.activations == "disk",
        )
    except ValueError as error:
        raise StageError(f"ptq_init: {error}") from error
    return {"seconds": time.perf_counter() - start, **_metrics(report)}


def check_fits(config: PTQInitConfig, base: Path) -> None:
    """Raise StageError if the method cannot do the model's sizes, or a group size does not divide them.

    Reads no weights, so that it can be asked before any compute is spent.
    """
    from tasks.checkpoints.folders import read_base_folder

    (method, options), scheme = config.parsed_method(), config.parsed_scheme()
    shape = DecoderShape.from_config(read_base_folder(base).config)
    try:
        for in_features in shape.in_features:
            scheme.num_groups(in_features)
        if method.rewrites and (rewrite := method.block_method(options).rewrite):
            rewrite(shape, scheme)
    except ValueError as error:
        raise StageError(f"ptq_init: {error}") from error


def _metrics(report: dict[str, dict[str, float | int]]) -> dict[str, Any]:
    """Figures for the record: every linear's relative error, and the most tries that one needed beyond the first."""
    errors = {name: float(row["error"]) for name, row in report.items()}
    return {
        "mean_error": sum(errors.values()) / len(errors),
        "max_error": max(errors.values()),
        "max_retries": max(row.get("retries", 0) for row in report.values()),
        "errors": errors,
    }
