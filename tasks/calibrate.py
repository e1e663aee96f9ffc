"""calibrate: calibration sequences, which PTQ reads its statistics from.

As published (paper, section 3.5, with the settings of ruikangliu/Quantized-Reasoning-Models): the full-precision model
answers the problems, and the traces, joined, are cut into random crops.

Departure: that repository's released code joins the prompts and only the first character of each answer
(methods/utils/data_utils.py indexes a string); here the traces are joined in full, as the paper says.
"""

from __future__ import annotations

from pathlib import Path

from tasks.calibration.config import CalibrateConfig
from tasks.runtime.stage import Context, Metrics, stage

__all__ = ["CalibrateConfig", "calibrate"]


@stage(
    kind="calibration",
    reads={"base": "base", "data": "calibration_data"},
    gives=("calibration",),
    packages=lambda config: config.generation.kind.packages if config.responses == "generated" else ("transformers",),
    chooses=lambda config: {"tasks.sampling.registry:ENGINES": config.generation.engine},
    fresh_process=lambda config: config.responses == "generated" and config.generation.kind.outlives_stage,
)
def calibrate(config: CalibrateConfig, context: Context, *, base: Path, data: Path) -> Metrics:
    """Write tokens.safetensors (input_ids and attention_mask, int64 [N, T]) and calibration.json.

    A killed stage that is run again answers only the batches of problems that its journal lacks.

    Raises:
        StageError: a data set that does not hold what is asked for, or problems too long for the model.
    """
    from tasks.calibration import packing, traces
    from tasks.checkpoints.models import check_model_folder, load_tokenizer
    from tasks.data.sources import read_dataset

    check_model_folder(base)
    tokenizer = load_tokenizer(base)
    examples = traces.choose(read_dataset(data), config)
    made, facts = traces.make(examples, config, context, base, tokenizer)
    packed = packing.pack(made, config, tokenizer)
    facts |= packed.facts | {"num_examples": len(examples), "responses": config.responses, "packing": config.packing}
    packing.write(packed, facts, context.output)
    return facts
