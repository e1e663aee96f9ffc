"""Configuration of calibration sequences; importing it loads no torch."""

from __future__ import annotations

from typing import Literal

from tasks.runtime.bounds import Count, Seed
from tasks.runtime.stage import StageConfig
from tasks.sampling.config import CalibrationGeneration


class CalibrateConfig(StageConfig):
    """The defaults are the paper's."""

    responses: Literal["generated", "given"] = "generated"
    """Traces of the full-precision model itself, or the data set's own responses and texts."""
    packing: Literal["crops", "examples"] = "crops"
    """Random crops of all texts joined, or one example per sequence, padded on the right."""
    num_sequences: Count = 128
    sequence_length: Count = 2048
    seed: Seed = 0
    generation: CalibrationGeneration = CalibrationGeneration()
    """How problems are answered; of given responses only prompt_suffix and enable_thinking count."""
