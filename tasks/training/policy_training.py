"""GRPO as a whole: problems, the engine that samples from the student, the judge, the loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tasks.checkpoints.models import load_model, load_student, load_tokenizer
from tasks.data.prompts import encode_prompt, opens_reasoning, render_prompt
from tasks.judging.judge import Judge
from tasks.judging.questions import Problem, ask, truth
from tasks.runtime.stage import Context, Metrics, StageError
from tasks.sampling.engine import Completion, Request, Student
from tasks.sampling.open import open_sampler, sampling_params
from tasks.sampling.sampler import Sampler, Tally
from tasks.sampling.tokens import needed_length, response_text, stop_token_ids
from tasks.training.grpo_config import GRPOTrainConfig
from tasks.training.objectives import GRPOObjective
from tasks.training.rollouts import Prompt, RolloutBatches
from tasks.training.student import select_trainable
from tasks.training.student_training import check_validation, read_rows, train_student
from tasks.training.validation import accuracy_measure

ROLLOUTS_FILE = "rollouts.parquet"
REWARD_METRICS = ("reward_mean", "zero_reward_fraction", "answer_found_rate")


def train_policy(
    config: GRPOTrainConfig, context: Context, student: Path, data: Path, validation: Path | None, judge: Judge
) -> Metrics:
    """Train on the problems of `data` with the judge's verdicts as reward; writes checkpoint, log and samples."""
    check_validation(config, validation)
    tokenizer = load_tokenizer(student)
    prompts, num_dropped = read_prompts(data, tokenizer, config)
    held_out = [] if validation is None else _held_out(validation, tokenizer, config)
    stops = stop_token_ids(student, tokenizer)
    lengths = ((prompt.id, prompt.token_ids) for prompt in [*prompts, *held_out])
    length = needed_length(lengths, config.generation.max_new_tokens, student)
    model = load_student(student, config.scale_mode, context.device, config.attention)
    select_trainable(model, config)
    reference = None
    if config.beta > 0:
        reference = load_model(student, torch.float32, context.device, config.attention).requires_grad_(False)
    trained = Student(model, autocast=config.mixed_precision == "bf16")
    sampling = sampling_params(config.generation, stops)
    with open_sampler(config.generation, sampling, student, context, length, trained) as sampler:
        source = RolloutBatches(
            prompts,
            _generate(sampler, model, config, context),
            judge,
            lambda ids: response_text(tokenizer, ids, stops),
            config,
        )
        objective = GRPOObjective(model, config, reference)
        measure = accuracy_measure(held_out, source.answers, config) if held_out else None
        rows, metrics = train_student(model, objective, source, config, context, student, measure)
    samples = [sample for row in rows for sample in row.get("samples", ())]
    pq.write_table(pa.Table.from_pylist(samples), context.output / ROLLOUTS_FILE)
    steps = [row for row in rows if row["step"] > 0]
    rewards = {name: sum(row[name] for row in steps) / len(steps) for name in REWARD_METRICS if steps}
    return {**metrics, **rewards, "num_problems": len(prompts), "num_dropped": num_dropped}


def read_prompts(data: Path, tokenizer: PreTrainedTokenizerBase, config: GRPOTrainConfig) -> tuple[list[Prompt], int]:
    """The problems of a dataset artifact, and how many were left out for their length or for want of an answer.

    Raises:
        StageError: none is left, or a problem's choices or tests are not of the form that its kind needs.
    """
    prompts, num_dropped = [], 0
    needed = "details" if config.kind == "code" else "answer"
    for row in read_rows(data, ("id", "prompt", "answer", "tier", "details")):
        prompt = None
        if row["prompt"] and row[needed]:
            prompt = _prompt(Problem(**row), tokenizer, config)
        if prompt is not None and len(prompt.token_ids) <= config.max_prompt_length:
            prompts.append(prompt)
        else:
            num_dropped += 1
    if not prompts:
        raise StageError(
            f"no problem is left: all {num_dropped} rows lack a prompt or what kind={config.kind!r} compares with "
            f"({needed}), or have more than max_prompt_length={config.max_prompt_length} prompt tokens. Choose other "
            "problems, or raise it."
        )
    return prompts, num_dropped


def _held_out(data: Path, tokenizer: PreTrainedTokenizerBase, config: GRPOTrainConfig) -> list[Prompt]:
    """The problems of `validation_data`."""
    try:
        return read_prompts(data, tokenizer, config)[0]
    except StageError as error:
        raise StageError(f"validation_data: {error}") from error


def _prompt(problem: Problem, tokenizer: PreTrainedTokenizerBase, config: GRPOTrainConfig) -> Prompt:
    generation = config.generation
    question = ask(config.kind, problem, config.seed, generation.prompt_suffix)
    ids = encode_prompt(tokenizer, question.prompt, generation.enable_thinking)
    opened = opens_reasoning(render_prompt(tokenizer, question.prompt, generation.enable_thinking))
    return Prompt(problem.id, tuple(ids), truth(config.kind, problem, question), opened)


def _generate(
    sampler: Sampler, model: PreTrainedModel, config: GRPOTrainConfig, context: Context
) -> Callable[[Sequence[Request], Sequence[str], int], Sequence[Completion]]:
    def generate(requests: Sequence[Request], names: Sequence[str], step: int) -> Sequence[Completion]:
        tally = Tally(config.steps, partial(context.progress, unit="step"), done=step)
        sampler.engine.load_weights(model)
        return sampler.complete(requests, names, tally)

    return generate
