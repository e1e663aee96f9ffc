"""evaluate: accuracy of a checkpoint on a data set of problems, by lighteval's pipeline on one of our engines.

Departure: max_new_tokens counts generated tokens only, so the context is that plus the longest prompt; the harness that
the paper builds on counts the prompt too.
Departure: answers are graded by the verifier that is the GRPO reward (last \\boxed{} after the last </think>), not by
lighteval's extraction, which prefers a "final answer is" in the middle of the reasoning to the box at its end.
"""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path
from typing import Any

from tasks.evaluation.config import MATH_SUFFIX, EvaluateConfig
from tasks.models import check_model_folder, load_tokenizer
from tasks.rewards.math_answer import Grader
from tasks.rollout.engine import Engine, open_engine
from tasks.stage import Context, stage

__all__ = ["MATH_SUFFIX", "EvaluateConfig", "evaluate"]


@stage(kind="evaluation", version="1")
def evaluate(config: EvaluateConfig, context: Context, *, checkpoint: Path, data: Path) -> dict[str, Any]:
    """Sample every problem under every seed and score the answers; writes results.json and samples.parquet.

    A killed evaluation that is run again samples only what its journal in context.scratch lacks.

    Raises:
        StageError: before any sampling, when data, checkpoint, tokenizer or lengths cannot work.
    """
    start = time.perf_counter()
    check_model_folder(checkpoint)
    from tasks.evaluation import harness, records  # lighteval takes seconds to import, and is needed only here

    evaluation = harness.prepare(config, checkpoint, load_tokenizer(checkpoint), data)
    with Grader() as grader, closing(_open(config, checkpoint, context.device, evaluation.max_model_len)) as engine:
        start_seconds = time.perf_counter() - start
        samples, results, timings = harness.run(
            evaluation,
            engine,
            grader.grade,
            context.scratch,
            lambda done, total: context.progress(done, total, unit="sample"),
        )
    records.write_artifact(context.output, samples, results)
    num_tokens = sum(samples.column("num_output_tokens").to_pylist())
    figures = {name: results[name] for name in ("accuracy", "std", "truncation_rate", "mean_length", "grader_timeouts")}
    return {**figures, **timings, "start_seconds": start_seconds, "num_output_tokens": num_tokens}


def _open(config: EvaluateConfig, checkpoint: Path, device: str, max_model_len: int) -> Engine:
    if config.engine == "vllm":
        return open_engine(
            "vllm", checkpoint, dtype=config.dtype, max_model_len=max_model_len, max_num_seqs=config.batch_size
        )
    return open_engine("transformers", checkpoint, device=device, dtype=config.dtype, batch_size=config.batch_size)
