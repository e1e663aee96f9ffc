"""Rollouts of GRPO: prompts, completions by an engine, rewards, and the micro-batches of the loss.

Which prompts a step takes is a function of (seed, rollout number), each completion's random stream one of (seed,
rollout number, place in the rollout), and the completions of these and the student's weights.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tasks.judging.judge import Judge
from tasks.judging.math_answer import Verdict
from tasks.judging.response import Response
from tasks.runtime.stage import StageError
from tasks.sampling.engine import Completion, Request
from tasks.training.batches import Example, by_length, collate, sample_indices
from tasks.training.grpo import group_advantages, token_weights, zero_variance
from tasks.training.grpo_config import RolloutConfig
from tasks.training.loop import Batch, StepBatches

if TYPE_CHECKING:
    from tasks.judging.code_answer import CodeVerdict

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prompt:
    id: str
    """Of its problem."""
    token_ids: tuple[int, ...]
    truth: str
    """What the judge compares a response with: the reference answer, or a program's tests as JSON."""
    reasoning_opened: bool = False
    """See judging.response.Response."""


Generate = Callable[[Sequence[Request], Sequence[str], int], Sequence[Completion]]
"""(requests, ids of their problems, step) -> completions, sampled with the student's present weights."""
Decode = Callable[[tuple[int, ...]], str]


@dataclass(frozen=True)
class Answers:
    """How the student answers problems now, and what the judge says of it."""

    generate: Generate
    judge: Judge
    decode: Decode

    def __call__(
        self, prompts: Sequence[Prompt], seeds: Sequence[int], step: int
    ) -> tuple[Sequence[Completion], list[str], Sequence[Verdict | CodeVerdict]]:
        """A completion of each prompt, as tokens and as text, and the verdict on it."""
        requests = [Request(prompt.token_ids, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        completions = self.generate(requests, [prompt.id for prompt in prompts], step)
        texts = [self.decode(completion.token_ids) for completion in completions]
        responses = [
            Response(text, completion.finish_reason == "length", prompt.reasoning_opened)
            for text, completion, prompt in zip(texts, completions, prompts, strict=True)
        ]
        return completions, texts, self.judge(responses, [prompt.truth for prompt in prompts])


@dataclass(frozen=True)
class Rollout:
    """The completions of one rollout, group after group, with what the loss and the log need of each."""

    prompts: list[Prompt]
    completions: Sequence[Completion]
    texts: list[str]
    verdicts: Sequence[Verdict | CodeVerdict]
    rewards_PG: Tensor
    advantages_PG: Tensor


class RolloutBatches:
    """BatchSource of GRPO; sample completions go with the steps."""

    def __init__(
        self,
        prompts: Sequence[Prompt],
        generate: Generate,
        judge: Judge,
        decode: Decode,
        config: RolloutConfig,
    ) -> None:
        self.prompts, self.answers = prompts, Answers(generate, judge, decode)
        self.config = config
        self.rollout: Rollout | None = None

    def step_batches(self, step: int) -> StepBatches:
        config = self.config
        number, update = divmod(step, config.updates_per_rollout)
        if update == 0:
            self.rollout = self._roll_out(number)
        assert self.rollout is not None  # checkpoints lie on rollout borders only
        samples = self._samples(step, self.rollout) if step % config.samples_every == 0 else []
        return replace(_step_batches(self.rollout, update, config), samples=samples)

    def _roll_out(self, number: int) -> Rollout:
        config, size = self.config, self.config.group_size
        chosen = sample_indices(len(self.prompts), config.batch_size // size, number, config.seed)
        prompts = [self.prompts[i] for i in chosen for _ in range(size)]
        seeds = [completion_seed(config.seed, number, place) for place in range(len(prompts))]
        completions, texts, verdicts = self.answers(prompts, seeds, number * config.updates_per_rollout)
        if config.importance_sampling and any(math.isnan(p) for c in completions for p in c.logprobs):
            raise StageError(
                "the engine gives no log-probabilities: set importance_sampling=false or take another engine"
            )
        rewards_PG = torch.tensor([float(v.correct) for v in verdicts], dtype=torch.float64).view(-1, size)
        advantages_PG = group_advantages(rewards_PG, config.scale_by_std)
        rollout = Rollout(prompts, completions, texts, verdicts, rewards_PG, advantages_PG)
        _tell_of_no_reward(rollout)
        return rollout

    def _samples(self, step: int, rollout: Rollout) -> list[dict[str, Any]]:
        """The first completions of the first groups."""
        num, size = len(rollout.completions), self.config.group_size
        places = [i for member in range(size) for i in range(member, num, size)][: self.config.num_samples]
        return [{"step": step + 1, **_sample_row(rollout, i)} for i in places]


def _tell_of_no_reward(rollout: Rollout) -> None:
    """A model whose every answer is wrong, or not found, learns nothing: the log says which."""
    if not bool(rollout.rewards_PG.any()):
        num, found = len(rollout.verdicts), sum(v.extracted is not None for v in rollout.verdicts)
        logger.warning(
            "none of %d completions was right, so this rollout teaches nothing; an answer was found in %d, and %d were "
            "cut off", num, found, sum(c.finish_reason == "length" for c in rollout.completions),
        )  # fmt: skip


def _sample_row(rollout: Rollout, i: int) -> dict[str, Any]:
    prompt, completion, verdict = rollout.prompts[i], rollout.completions[i], rollout.verdicts[i]
    return {
        "problem_id": prompt.id,
        "completion": rollout.texts[i],
        "gold": prompt.truth,
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
    weights, denominator = token_weights(lengths, counted, config.loss_normalization, config.generation.max_new_tokens)
    weight_of = dict(zip(places, weights, strict=True))
    groups = by_length(places, lambda i: _length(rollout, i), config.micro_batch_size)
    batches = [_collate(rollout, group, weight_of, slot, update) for slot, group in enumerate(groups)]
    return StepBatches(batches, denominator, _metrics(rollout))


def _length(rollout: Rollout, i: int) -> int:
    return len(rollout.prompts[i].token_ids) + len(rollout.completions[i].token_ids)


def _collate(rollout: Rollout, places: list[int], weight_of: dict[int, float], slot: int, update: int) -> Batch:
    """`batches.collate` of prompts with completions, and per completion token what `grpo.TokenTerms` names."""
    examples: list[Example] = []
    advantages: list[float] = []
    weights: list[float] = []
    logprobs: list[float] = []
    for i in places:
        prompt_ids, completion = rollout.prompts[i].token_ids, rollout.completions[i]
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
        "answer_found_rate": sum(v.extracted is not None for v in rollout.verdicts) / num,
        "grader_timeouts": sum(v.timed_out for v in rollout.verdicts),
    }


def completion_seed(*parts: int | str) -> int:
    """The sampling seed, in [0, 2^31), of one completion of a run."""
    hashed = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(hashed[:4], "big") >> 1
