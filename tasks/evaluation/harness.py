"""One evaluation from checked inputs to figures: a pipeline run per seed, one engine and one grader for all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tasks.evaluation import lighteval_compat as lighteval
from tasks.evaluation.benchmarks import Grade, math_document, math_task
from tasks.evaluation.config import EvaluateConfig
from tasks.evaluation.journal import Journal
from tasks.evaluation.lighteval_model import ChatPrompts, EngineModel, run_pipeline
from tasks.evaluation.problems import Problem, load_problems, write_lighteval_folder
from tasks.evaluation.records import sample_row, samples_table
from tasks.evaluation.statistics import summarize
from tasks.evaluation.tokens import check_lengths, stop_token_ids
from tasks.rewards.math_answer import Verdict
from tasks.rollout.engine import Engine, SamplingParams

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Evaluation:
    """Checked inputs: nothing in them can go wrong any more once an engine has been opened."""

    config: EvaluateConfig
    problems: list[Problem]
    prompts: ChatPrompts
    sampling: SamplingParams
    max_model_len: int
    """Tokens of the longest prompt and max_new_tokens."""


def prepare(config: EvaluateConfig, checkpoint: Path, tokenizer: Any, data: Path) -> Evaluation:
    """Read and check everything that an evaluation needs before an engine is worth opening.

    Raises:
        StageError: unusable data, no chat template, no stop token, or a prompt that is too long.
    """
    problems = load_problems(data, config.num_problems)
    prompts = ChatPrompts(tokenizer, config.enable_thinking)
    prompt_ids = {
        problem.id: prompts.token_ids(math_document(vars(problem), config.prompt_suffix)) for problem in problems
    }
    sampling = SamplingParams(
        temperature=config.temperature,
        top_p=config.top_p,
        max_new_tokens=config.max_new_tokens,
        stop_token_ids=stop_token_ids(checkpoint, tokenizer),
    )
    max_model_len = check_lengths(prompt_ids, config.max_new_tokens, checkpoint)
    return Evaluation(config, problems, prompts, sampling, max_model_len)


@dataclass
class _TimedGrade:
    """A grading function that adds up the seconds spent in it."""

    grade: Grade
    seconds: float = 0.0

    def __call__(self, responses: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        start = time.perf_counter()
        verdicts = self.grade(responses, answers)
        self.seconds += time.perf_counter() - start
        return verdicts


def run(
    evaluation: Evaluation, engine: Engine, grade: Grade, scratch: Path, progress: Progress
) -> tuple[pa.Table, dict[str, Any], dict[str, float]]:
    """Sample and score under every seed; returns samples, results (both deterministic) and timings in seconds.

    `progress(done, total)` is called after every sample, at once for those that an earlier, killed run had finished.
    """
    config = evaluation.config
    write_lighteval_folder(evaluation.problems, scratch / "problems")
    timed_grade = _TimedGrade(grade)
    task = math_task(config.name, scratch / "problems", config.prompt_suffix, timed_grade)
    total, done = len(evaluation.problems) * len(config.seeds), 0

    def on_sample() -> None:
        nonlocal done
        done += 1
        progress(done, total)

    rows: list[dict[str, Any]] = []
    accuracies: list[float] = []
    start = time.perf_counter()
    with Journal(scratch / "generations.jsonl") as journal, lighteval.isolated(scratch / "datasets"):
        num_resumed = len(journal)
        for seed in config.seeds:
            model = EngineModel(engine, evaluation.prompts, evaluation.sampling, seed, journal, on_sample)
            details, accuracy = run_pipeline(task, model, scratch / "lighteval")
            rows += [sample_row(detail.doc, detail.model_response, seed) for detail in details]
            accuracies.append(accuracy)
    sampling_seconds = time.perf_counter() - start - timed_grade.seconds
    samples = samples_table(rows, [problem.id for problem in evaluation.problems], config.seeds)
    timings = {
        "sampling_seconds": sampling_seconds,
        "grading_seconds": timed_grade.seconds,
        "num_samples_resumed": num_resumed,
    }
    results = _results(evaluation, samples)
    assert np.allclose(results["per_seed"], accuracies), "our figures and lighteval's are of the same samples"
    return samples, results, timings


def _results(evaluation: Evaluation, samples: pa.Table) -> dict[str, Any]:
    config = evaluation.config
    frame = samples.select(
        ["problem_id", "seed", "tier", "correct", "timed_out", "finish_reason", "num_output_tokens"]
    ).to_pandas()
    return {
        "task": config.name,
        "harness": lighteval.HARNESS,
        "engine": config.engine,
        "sampling": {
            **config.model_dump(include={"temperature", "top_p", "max_new_tokens", "enable_thinking", "prompt_suffix"}),
            "dtype": config.dtype,
            "stop_token_ids": list(evaluation.sampling.stop_token_ids),
        },
        **summarize(frame, config.seeds),
        "grader_timeouts": int(frame["timed_out"].sum()),
    }
