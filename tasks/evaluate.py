"""evaluate: accuracy of a checkpoint on a data set of problems, by lighteval's pipeline on one of our engines.

Departure: max_new_tokens counts generated tokens only, so the context is that plus the longest prompt; the harness that
the paper builds on counts the prompt too.
Departure: accuracy is the strict scorer's, by the judge that gives the GRPO reward (last \\boxed{} after the last
</think>); a response that was cut off is wrong.  How the paper's harness scores the same samples stands beside it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tasks.evaluation.config import EvaluateConfig
from tasks.judging.response import PACKAGES
from tasks.runtime.stage import Context, stage

__all__ = ["EvaluateConfig", "evaluate"]


def _packages(config: EvaluateConfig) -> tuple[str, ...]:
    return ("lighteval", *PACKAGES.get(config.kind, ()), *config.generation.kind.packages)


def _check(config: EvaluateConfig) -> None:
    from tasks.judging.judge import check_judge

    check_judge(config.kind, config.unsafe_code)


@stage(
    kind="evaluation",
    reads={"checkpoint": "model", "data": "test_data"},
    packages=_packages,
    check=_check,
    chooses=lambda config: {
        "tasks.sampling.registry:ENGINES": config.generation.engine,
        "tasks.evaluation.scoring:SCORERS": config.kind,
    },
    fresh_process=lambda config: config.generation.kind.outlives_stage,
)
def evaluate(config: EvaluateConfig, context: Context, *, checkpoint: Path, data: Path) -> dict[str, Any]:
    """Sample every problem under every seed and score the answers; writes results.json and samples.parquet.

    A killed evaluation that is run again samples only what its journal in context.scratch lacks.

    Raises:
        StageError: before any sampling, when data, checkpoint, tokenizer or lengths cannot work, programs would have
            to run without a sandbox, or devices are too few for data_parallel replicas.
    """
    from tasks.checkpoints.models import check_model_folder

    check_model_folder(checkpoint)
    from tasks.evaluation.harness import evaluate_checkpoint  # lighteval takes seconds to import

    return evaluate_checkpoint(config, context, checkpoint, data)
