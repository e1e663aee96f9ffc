"""Rollouts of GRPO: prompts, completions by an engine, rewards, and the micro-batches of the loss.

Which prompts a step takes is a function of (seed, rollout number), each completion's random stream one of (seed,
rollout number, place in the rollout), and the completions of these and the student's weights.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from tasks.runtime.stage import StageError
from tasks.training.batches import Example, by_length, collate, sample_indices
from tasks.training.grpo import PolicyConfig, group_advantages, token_weights, zero_variance
from tasks.training.loop import Batch, StepBatches

SAMPLES_FOLDER = "rollouts"


class RolloutConfig(PolicyConfig):
    """`batch_size` counts completions: batch_size / group_size prompts a step."""

    max_new_tokens: int = Field(default=32768, gt=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    samples_every: int = Field(default=1, gt=0)
    """Steps between the sample completions that are kept, counted in optimizer steps."""
    num_samples: int = Field(default=2, ge=0)

    @model_validator(mode="after")
    def _whole_groups(self) -> Self:
        if self.batch_size % self.group_size:
            raise ValueError(f"batch_size={self.batch_size} must be a multiple of group_size={self.group_size}")
        if self.checkpoint_every % self.updates_per_rollout:
            raise ValueError(
                f"checkpoint_every={self.checkpoint_every} must be a multiple of updates_per_rollout="
                f"{self.updates_per_rollout}: a run can resume only where a rollout begins"
            )
        return self


@dataclass(frozen=True)
class Problem:
    id: str
    prompt_ids: tuple[int, ...]
    answer: str
    """What the grader compares a response with: the reference answer, or a program's tests as JSON."""


class Completion(Protocol):
    """A completion as an engine gives it; the stop token is part of it."""

    @property
    def token_ids(self) -> tuple[int, ...]: ...
    @property
    def logprobs(self) -> tuple[float, ...]: ...
    @property
    def finish_reason(self) -> Literal["stop", "length"]: ...


class Verdict(Protocol):
    """What the grader says of one response."""

    @property
    def correct(self) -> bool: ...
    @property
    def extracted(self) -> str | None: ...
    @property
    def timed_out(self) -> bool: ...


Generate = Callable[[list[tuple[tuple[int, ...], int]]], Sequence[Completion]]
"""[(prompt_ids, seed)] -> completions, sampled with the student's present weights."""
Grade = Callable[[list[str], list[str]], Sequence[Verdict]]
"""(responses, answers) -> verdicts."""
Decode = Callable[[tuple[int, ...]], str]


@dataclass(frozen=True)
class Rollout:
    """The completions of one rollout, group after group, with what the loss and the log need of each."""

    problems: list[Problem]
    completions: Sequence[Completion]
    texts: list[str]
    verdicts: Sequence[Verdict]
    rewards_PG: Tensor
    advantages_PG: Tensor


class RolloutBatches:
    """BatchSource of GRPO; sample completions go to `scratch`, from where `sample_rows` collects them."""

    def __init__(
        self,
        problems: Sequence[Problem],
        generate: Generate,
        grade: Grade,
        decode: Decode,
        config: RolloutConfig,
        scratch: Path,
    ) -> None:
        self.problems, self.generate, self.grade, self.decode = problems, generate, grade, decode
        self.config, self.folder = config, scratch / SAMPLES_FOLDER
        self.rollout: Rollout | None = None

    def step_batches(self, step: int) -> StepBatches:
        config = self.config
        number, update = divmod(step, config.updates_per_rollout)
        if update == 0:
            self.rollout = self._roll_out(number)
        assert self.rollout is not None  # checkpoints lie on rollout borders only
        if step % config.samples_every == 0:
            self._keep_samples(step, self.rollout)
        return _step_batches(self.rollout, update, config)

    def _roll_out(self, number: int) -> Rollout:
        config, size = self.config, self.config.group_size
        chosen = sample_indices(len(self.problems), config.batch_size // size, number, config.seed)
        problems, requests = [], []
        for place, i in enumerate(chosen):
            for member in range(size):
                problems.append(self.problems[i])
                requests.append((self.problems[i].prompt_ids, _seed(config.seed, number, place * size + member)))
        completions = self.generate(requests)
        if config.importance_sampling and any(math.isnan(p) for c in completions for p in c.logprobs):
            raise StageError(
                "the engine gives no log-probabilities: set importance_sampling=false or take another engine"
            )
        texts = [self.decode(completion.token_ids) for completion in completions]
        verdicts = self.grade(texts, [problem.answer for problem in problems])
        rewards_PG = torch.tensor([float(v.correct) for v in verdicts], dtype=torch.float64).view(-1, size)
        advantages_PG = group_advantages(rewards_PG, config.scale_by_std)
        return Rollout(problems, completions, texts, verdicts, rewards_PG, advantages_PG)

    def _keep_samples(self, step: int, rollout: Rollout) -> None:
        """The first completions of the first groups, as JSON; a step that runs again writes the same bytes again."""
        num, size = len(rollout.completions), self.config.group_size
        places = [i for member in range(size) for i in range(member, num, size)][: self.config.num_samples]
        rows = [{"step": step + 1, **_sample_row(rollout, i)} for i in places]
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"{step + 1:08d}.json").write_text(json.dumps(rows))


def sample_rows(scratch: Path, steps: int) -> list[dict[str, Any]]:
    """All kept sample completions of the first `steps` steps in order."""
    files = sorted((scratch / SAMPLES_FOLDER).glob("*.json"))
    return [row for file in files if int(file.stem) <= steps for row in json.loads(file.read_text())]


def _sample_row(rollout: Rollout, i: int) -> dict[str, Any]:
    problem, completion, verdict = rollout.problems[i], rollout.completions[i], rollout.verdicts[i]
    return {
        "problem_id": problem.id,
        "completion": rollout.texts[i],
        "gold": problem.answer,
        "extracted": verdict.extracted or "",
        "reward": float(rollout.rewards_PG.view(-1)[i]),
        "advantage": float(rollout.advantages_PG.view(-1)[i]),
        "finish_reason": completion.finish_reason,
        "num_output_tokens": len(completion.token_ids),
    }


def _step_batches(rollout: Rollout, update: int, config: RolloutConfig) -> StepBatches:
    silent_P = zero_variance(rollout.rewards_PG)
    places = list(range(len(rollout.completions)))
    if config.drop_zero_variance:
        places = [i for i in places if not silent_P[i // config.group_size]]
    lengths = [len(rollout.completions[i].token_ids) for i in places]
    truncated = [rollout.completions[i].finish_reason == "length" for i in places]
    counted = [not (config.mask_truncated and t) for t in truncated]
    weights, denominator = token_weights(lengths, counted, config.loss_normalization, config.max_new_tokens)
    weight_of = dict(zip(places, weights, strict=True))
    groups = by_length(places, lambda i: _length(rollout, i), config.micro_batch_size)
    batches = [_collate(rollout, group, weight_of, slot, update) for slot, group in enumerate(groups)]
    return StepBatches(batches, denominator, _metrics(rollout))


def _length(rollout: Rollout, i: int) -> int:
    return len(rollout.problems[i].prompt_ids) + len(rollout.completions[i].token_ids)


def _collate(rollout: Rollout, places: list[int], weight_of: dict[int, float], slot: int, update: int) -> Batch:
    """`batches.collate` of prompts with completions, and per completion token what `grpo.TokenTerms` names."""
    examples: list[Example] = []
    advantages: list[float] = []
    weights: list[float] = []
    logprobs: list[float] = []
    for i in places:
        prompt_ids, completion = rollout.problems[i].prompt_ids, rollout.completions[i]
        num = len(completion.token_ids)
        examples.append(Example(i, torch.tensor(prompt_ids + completion.token_ids, dtype=torch.int32), len(prompt_ids)))
        advantages += [float(rollout.advantages_PG.view(-1)[i])] * num
        weights += [weight_of[i]] * num
        logprobs += completion.logprobs
    return collate(examples) | {
        "advantages": torch.tensor(advantages),
        "weights": torch.tensor(weights),
        "engine_logprobs": torch.tensor(logprobs),
        "slot": torch.tensor(slot),
        "update": torch.tensor(update),
    }


def _metrics(rollout: Rollout) -> dict[str, float | None]:
    rewards_PG = rollout.rewards_PG
    lengths = [len(completion.token_ids) for completion in rollout.completions]
    num = len(lengths)
    return {
        "reward_mean": float(rewards_PG.mean()),
        "reward_std": float(rewards_PG.std()),
        "zero_variance_fraction": float(zero_variance(rewards_PG).double().mean()),
        "zero_reward_fraction": float((rewards_PG == 0).all(1).double().mean()),
        "response_length": sum(lengths) / num,
        "truncated_fraction": sum(c.finish_reason == "length" for c in rollout.completions) / num,
        "grader_timeouts": sum(v.timed_out for v in rollout.verdicts),
    }


def _seed(*parts: int) -> int:
    """The sampling seed, in [0, 2^31), of one completion of a run."""
    hashed = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(hashed[:4], "big") >> 1
