"""One evaluation from checked inputs to figures: a pipeline run per seed, one engine and one grader for all of them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from tasks.data.benchmarks import TaskKind
from tasks.evaluation import lighteval_compat as lighteval
from tasks.evaluation.config import EvaluateConfig
from tasks.evaluation.lighteval_model import ChatPrompts, EngineModel, run_pipeline
from tasks.evaluation.lighteval_tasks import answer_task, document
from tasks.evaluation.options import Options
from tasks.evaluation.problems import Problem, load_problems
from tasks.evaluation.questions import Question, ask
from tasks.evaluation.records import sample_row, tables
from tasks.evaluation.statistics import summarize
from tasks.judging.judge import Response, Score, Scores
from tasks.sampling.engine import Engine, SamplingParams
from tasks.sampling.journal import Journal
from tasks.sampling.tokens import check_lengths, stop_token_ids
from tasks.sampling.watchdog import Watchdog


class Progress(Protocol):
    """Takes how many samples of how many are there, and what else is to be told."""

    def __call__(self, done: int, total: int, **info: str) -> None: ...


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


def prepare(config: EvaluateConfig, checkpoint: Path, tokenizer: Any, data: Path) -> Evaluation:
    """Read and check everything that an evaluation needs before an engine is worth opening.

    Raises:
        StageError: unusable data, no chat template, no stop token, or a prompt that is too long.
    """
    problems = load_problems(data, config.num_problems)
    questions = {
        seed: [ask(config.kind, problem, seed, config.prompt_suffix) for problem in problems] for seed in config.seeds
    }
    prompts = ChatPrompts(tokenizer, config.enable_thinking)
    sampling = SamplingParams(
        temperature=config.temperature,
        top_p=config.top_p,
        max_new_tokens=config.max_new_tokens,
        stop_token_ids=stop_token_ids(checkpoint, tokenizer),
    )
    longest = _longest_inputs(config.kind, questions, prompts)
    max_model_len = check_lengths(longest, config.max_new_tokens, checkpoint)
    return Evaluation(config, problems, questions, prompts, sampling, max_model_len)


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
    evaluation: Evaluation,
    engine: Engine,
    score: Score,
    scratch: Path,
    progress: Progress,
    identity: Mapping[str, str],
) -> tuple[pa.Table, dict[str, Any], Measured]:
    """Sample and score under every seed; returns samples, results (both deterministic) and what was measured.

    `progress(done, total)` is called after every sample, at once for those that an earlier, killed run had finished,
    and with `stalled=...` while the engine gives no tokens.  `identity` says what computes, see journal.request_key.
    """
    config = evaluation.config
    timed_score = _TimedScore(score)
    total, done = sum(map(len, evaluation.questions.values())), 0

    def on_sample() -> None:
        nonlocal done
        done += 1
        progress(done, total)

    def on_stall(message: str) -> None:
        progress(done, total, stalled=message)

    watch = partial(Watchdog, config.stall_seconds, config.stall_limit_seconds, on_stall=on_stall)
    rows: list[dict[str, Any]] = []
    means: list[dict[str, float]] = []
    start = time.perf_counter()
    with Journal(scratch / "generations.jsonl") as journal, lighteval.isolated(scratch / "datasets"):
        for seed, questions in evaluation.questions.items():
            task = answer_task(config.name, config.kind, questions, scratch / "questions" / str(seed), timed_score)
            model = EngineModel(
                engine, evaluation.prompts, evaluation.sampling, seed, journal, identity, watch, on_sample
            )
            details, seed_means = run_pipeline(task, model, scratch / "lighteval")
            rows += [sample_row(detail.doc, detail.model_response, seed) for detail in details]
            means.append(seed_means)
    sampling_seconds = time.perf_counter() - start - timed_score.seconds
    samples, timings = tables(rows, [question.id for question in evaluation.questions[config.seeds[0]]], config.seeds)
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


def _results(evaluation: Evaluation, samples: pa.Table) -> dict[str, Any]:
    config = evaluation.config
    frame = samples.drop_columns(["prompt_ids", "output_ids", "output_text"]).to_pandas()
    return {
        "task": config.name,
        "kind": config.kind,
        "unsafe_code": config.unsafe_code,
        "harness": lighteval.HARNESS,
        "engine": config.engine,
        "sampling": {
            **config.model_dump(include={"temperature", "top_p", "max_new_tokens", "enable_thinking", "prompt_suffix"}),
            "dtype": config.dtype,
            "stop_token_ids": list(evaluation.sampling.stop_token_ids),
        },
        **summarize(frame, config.seeds),
    }
