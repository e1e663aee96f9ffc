"""One evaluation from checked inputs to figures: a pipeline run per seed, one engine and one grader for all of them."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from artifacts import scratch as midstage
from tasks.checkpoints.models import load_tokenizer
from tasks.data.benchmarks import TaskKind
from tasks.evaluation import lighteval_compat as lighteval
from tasks.evaluation import records
from tasks.evaluation.config import EvaluateConfig
from tasks.evaluation.lighteval_model import ChatPrompts, EngineModel, run_pipeline
from tasks.evaluation.lighteval_tasks import answer_task, document
from tasks.evaluation.options import Options, ask_options
from tasks.evaluation.problems import load_problems
from tasks.evaluation.scoring import Score, Scores, open_scorer
from tasks.evaluation.statistics import summarize
from tasks.judging.questions import Problem, Question, ask
from tasks.judging.response import Response
from tasks.runtime.machine import hardware, package_versions
from tasks.runtime.stage import Context
from tasks.sampling.engine import SamplingParams
from tasks.sampling.open import open_sampler, sampling_params
from tasks.sampling.sampler import Progress, Sampler, Tally
from tasks.sampling.tokens import needed_length, stop_token_ids

RECORDED = ("accuracy", "std", "truncation_rate", "mean_length", "grader_timeouts")
"""Figures of results.json that the record shows."""
SAMPLING_FIELDS = {"temperature", "top_p", "max_new_tokens", "enable_thinking", "prompt_suffix", "dtype"}


@dataclass(frozen=True)
class Evaluation:
    """Checked inputs: nothing in them can go wrong any more once an engine has been opened."""

    config: EvaluateConfig
    problems: list[Problem]
    questions: dict[int, list[Question]]
    """By seed; the same problems in the same order for each."""
    prompts: ChatPrompts
    sampling: SamplingParams
    max_model_len: int
    """Tokens of the longest prompt, or option with its context, and max_new_tokens."""


def evaluate_checkpoint(config: EvaluateConfig, context: Context, checkpoint: Path, data: Path) -> dict[str, Any]:
    """The whole evaluation: writes the artifact and its telemetry, and returns the figures of the record."""
    start = time.perf_counter()
    evaluation = prepare(config, checkpoint, load_tokenizer(checkpoint), data)
    length = evaluation.max_model_len
    with (
        open_scorer(config, evaluation.problems) as score,
        open_sampler(config.generation, evaluation.sampling, checkpoint, context, length) as sampler,
    ):
        start_seconds = time.perf_counter() - start
        progress = partial(context.progress, unit="sample")
        samples, results, measured = run(evaluation, sampler, score, context.scratch, progress)
    results["provenance"] = {"inputs": dict(context.input_digests), "versions": package_versions()}
    records.write_artifact(context.output, samples, results)
    records.write_telemetry(context.telemetry, measured.timings, hardware())
    num_tokens = sum(samples.column("num_output_tokens").to_pylist())
    figures = {name: results[name] for name in RECORDED}
    return {**figures, **measured.figures, "start_seconds": start_seconds, "num_output_tokens": num_tokens}


def prepare(config: EvaluateConfig, checkpoint: Path, tokenizer: Any, data: Path) -> Evaluation:
    """Read and check everything that an evaluation needs before an engine is worth opening.

    Raises:
        StageError: unusable data, no chat template, no stop token, or a prompt that is too long.
    """
    problems = load_problems(data, config.num_problems)
    questions = {seed: [_ask(config, problem, seed) for problem in problems] for seed in config.seeds}
    prompts = ChatPrompts(tokenizer, config.generation.enable_thinking)
    sampling = sampling_params(config.generation, stop_token_ids(checkpoint, tokenizer))
    longest = _longest_inputs(config.kind, questions, prompts)
    max_model_len = needed_length(longest.items(), config.generation.max_new_tokens, checkpoint)
    return Evaluation(config, problems, questions, prompts, sampling, max_model_len)


def _ask(config: EvaluateConfig, problem: Problem, seed: int) -> Question:
    if config.kind == "loglikelihood":
        return ask_options(problem)
    return ask(config.kind, problem, seed, config.generation.prompt_suffix)


def _longest_inputs(
    kind: TaskKind, questions: Mapping[int, Sequence[Question]], prompts: ChatPrompts
) -> dict[str, tuple[int, ...]]:
    """For each problem id the tokens of its longest prompt over the seeds, or of its longest option with context."""
    distinct = {(question.id, question.prompt): question for asked in questions.values() for question in asked}
    longest: dict[str, tuple[int, ...]] = {}
    for question in distinct.values():
        if kind == "loglikelihood":
            inputs = [context + rest for context, rest in Options.parse(question.details).encode(prompts.tokenizer)]
        else:
            inputs = [prompts.token_ids(document(vars(question)))]
        longest[question.id] = max(longest.get(question.id, ()), *inputs, key=len)
    return longest


@dataclass
class _TimedScore:
    """A scorer that adds up the seconds spent in it."""

    score: Score
    seconds: float = 0.0

    def __call__(self, responses: Sequence[Response], golds: Sequence[str]) -> list[Scores]:
        start = time.perf_counter()
        scores = self.score(responses, golds)
        self.seconds += time.perf_counter() - start
        return scores


@dataclass(frozen=True)
class Measured:
    """What an execution took; it differs from run to run."""

    timings: pa.Table
    """Seconds of each sample, see records.TIMINGS_SCHEMA."""
    figures: dict[str, float]


def run(
    evaluation: Evaluation, sampler: Sampler, score: Score, scratch: Path, progress: Progress
) -> tuple[pa.Table, dict[str, Any], Measured]:
    """Sample and score under every seed; returns samples, results (both deterministic) and what was measured.

    `progress(done, total)` is called after every sample, at once for those that an earlier, killed run had finished,
    and with `stalled=...` while the engine gives no tokens.
    """
    config = evaluation.config
    timed_score = _TimedScore(score)
    tally = Tally(sum(map(len, evaluation.questions.values())), progress)
    rows: list[dict[str, Any]] = []
    means: list[dict[str, float]] = []
    start = time.perf_counter()
    folder = scratch / "lighteval"
    midstage.remove(folder)  # of what a killed run left, the journal alone is checked, and read
    with lighteval.isolated(folder / "datasets"):
        for seed, questions in evaluation.questions.items():
            task = answer_task(config.name, config.kind, questions, folder / "questions" / str(seed), timed_score)
            model = EngineModel(sampler, evaluation.prompts, seed, tally)
            details, seed_means = run_pipeline(task, model, folder / "output")
            rows += [records.sample_row(detail.doc, detail.model_response, seed) for detail in details]
            means.append(seed_means)
    sampling_seconds = time.perf_counter() - start - timed_score.seconds
    samples, timings = records.tables(rows, [problem.id for problem in evaluation.problems], config.seeds)
    results = _results(evaluation, samples)
    for metric, figures in (("accuracy", results), ("accuracy_paper", results["paper"])):
        ours, lightevals = figures["per_seed"], [seed_means[metric] for seed_means in means]
        assert np.allclose(ours, lightevals), f"{metric}: our figures and lighteval's are of the same samples"
    seconds = {
        "sampling_seconds": sampling_seconds,
        "grading_seconds": timed_score.seconds,
        "num_samples_resumed": sum(row["resumed"] for row in rows),
    }
    return samples, results, Measured(timings, seconds)


def _ran_unsafely(samples: pa.Table) -> bool:
    """Whether programs ran without a sandbox: one that works is used even where it need not be."""
    return not all(json.loads(details)["sandboxed"] for details in samples.column("details").to_pylist())


def _results(evaluation: Evaluation, samples: pa.Table) -> dict[str, Any]:
    config = evaluation.config
    frame = samples.drop_columns(["prompt_ids", "output_ids", "output_text"]).to_pandas()
    return {
        "task": config.name,
        "kind": config.kind,
        "unsafe_code": config.kind == "code" and _ran_unsafely(samples),
        "harness": lighteval.HARNESS,
        "engine": config.generation.engine,
        "sampling": {
            **config.generation.model_dump(include=SAMPLING_FIELDS),
            "stop_token_ids": list(evaluation.sampling.stop_token_ids),
        },
        **summarize(frame, config.seeds),
    }
