"""A full-precision checkpoint -> the QAT start: dequantized weights, and latents with their grids."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open

from quant.calibration.activations import Keep, in_memory, on_disk
from quant.calibration.streaming import Batch, BlockMethod, Progress, quantize_blocks
from quant.grids.scheme import Scheme
from tasks.checkpoints.files import write_json
from tasks.checkpoints.stream import CheckpointStream
from tasks.runtime.stage import Context, StageError

REPORT = "ptq_report.json"
Report = dict[str, dict[str, float | int]]


def quantize_checkpoint(
    base: Path,
    method: BlockMethod,
    scheme: Scheme,
    context: Context,
    *,
    calibration: Path | None,
    batch_size: int,
    activations_on_disk: bool,
) -> Report:
    """Quantize `base` block by block into the context's output; returns the figures of every linear.

    Raises StageError, or ValueError of the method, for what does not fit.
    """
    stream = CheckpointStream(base, context.scratch, scheme, context.device, method.rewrite)
    keep = on_disk(context.scratch / "activations") if activations_on_disk else in_memory
    batches = _batches(calibration, stream, batch_size, keep) if method.needs_calibration else []
    quantize_blocks(stream, batches, method, scheme, _block_progress(context))
    stream.finish(context.output, method.learned_transforms)
    report = stream.report()
    write_json(context.output / REPORT, report)
    return report


def _batches(calibration: Path | None, stream: CheckpointStream, batch_size: int, keep: Keep) -> list[Batch]:
    """StageError when the set is missing or does not fit the model."""
    if calibration is None:
        raise StageError("this method needs calibration data: give the artifact of the calibrate stage")
    with safe_open(calibration / "tokens.safetensors", framework="pt") as file:
        input_ids_NT, mask_NT = file.get_tensor("input_ids"), file.get_tensor("attention_mask")
    if not mask_NT.numel() or not bool(mask_NT.any(1).all()):
        raise StageError("the calibration set is empty or holds an empty sequence; run calibrate with other data")
    if int(input_ids_NT.max()) >= stream.config.vocab_size:
        raise StageError("the calibration tokens exceed the model's vocabulary; calibrate with its own tokenizer")
    return stream.batches(input_ids_NT, mask_NT, batch_size, keep)


def _block_progress(context: Context) -> Progress:
    return lambda done, total, info: context.progress(done, total, "block", **info)
