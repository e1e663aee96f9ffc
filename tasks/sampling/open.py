"""Opening a sampler, on a checkpoint or on the student that is being trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

from tasks.runtime.machine import package_versions
from tasks.runtime.stage import Context
from tasks.sampling.config import GenerationConfig
from tasks.sampling.engine import Engine, EngineOptions, SamplingParams, Student
from tasks.sampling.journal import FILE, Journal
from tasks.sampling.registry import open_engine
from tasks.sampling.replicas import ReplicatedEngine
from tasks.sampling.sampler import Sampler


def sampling_params(config: GenerationConfig, stops: tuple[int, ...]) -> SamplingParams:
    """How tokens are picked, until one of `stops` (tokens.stop_token_ids)."""
    return SamplingParams(config.temperature, config.top_p, config.max_new_tokens, stops)


@contextmanager
def open_sampler(
    config: GenerationConfig,
    sampling: SamplingParams,
    checkpoint: Path,
    context: Context,
    max_model_len: int,
    student: Student | None = None,
) -> Iterator[Sampler]:
    """A sampler that keeps what it has finished in context.scratch; with a student, one that keeps nothing.

    Args:
        checkpoint: what is sampled, or what the student started from.
        max_model_len: tokens of the longest prompt with its completion, see tokens.needed_length.

    Raises:
        StageError: a checkpoint that the engine cannot run, or too few devices for data_parallel replicas.
    """
    with ExitStack() as stack:
        engine = stack.enter_context(closing(_open(config, checkpoint, context.device, max_model_len, student)))
        if student is not None:
            yield Sampler(engine, sampling, config)
            return
        journal = stack.enter_context(Journal(context.scratch / FILE))
        yield Sampler(engine, sampling, config, journal, identity(config, context.device))


def _open(
    config: GenerationConfig, checkpoint: Path, device: str, max_model_len: int, student: Student | None
) -> Engine:
    options = EngineOptions(
        max_model_len=max_model_len,
        dtype=config.dtype,
        device=device,
        batch_size=config.batch_size,
        tensor_parallel=config.tensor_parallel,
        gpu_memory_utilization=config.gpu_memory_utilization,
    )
    if config.data_parallel > 1:
        return ReplicatedEngine(config.engine, checkpoint, config.data_parallel, options)
    return open_engine(config.engine, checkpoint, options, student)


def identity(config: GenerationConfig, device: str) -> dict[str, str]:
    """What a sample depends on beside checkpoint and request: engine, dtype, device and versions."""
    versions = package_versions()
    computing = {name: versions[name] for name in config.kind.packages if name in versions}
    return {"engine": config.engine, "dtype": config.dtype, "device": device, **computing}
