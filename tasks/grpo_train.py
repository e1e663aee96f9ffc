"""grpo_train: reinforcement learning of the quantized student with a correctness reward (paper, section 3.4).

The defaults are those of Table 7; group size 8, reward 1 for a right answer and else 0. Whether it is right says the
judge of evaluation, completion by completion: what evaluation counts as right earns the reward, and nothing else does.
Departure: Table 7's global batch of 64 is read as 64 completions, that is 8 prompts x 8, in 4 micro-batches of 16.
Departure: the paper names no sampling temperature for rollouts, no KL weight and no loss normalisation.  Defaults:
temperature 1, no KL, "grpo", one update per rollout.
Departure: Table 7 names one learning rate; transforms and clips (W4A4KV4) keep Table 6's ratios to it, 50 and 500.

Started from a PTQ checkpoint this is the paper's zero-RL: while no completion is right, every advantage is 0, the steps
teach nothing, and the log shows it (reward_mean, zero_reward_fraction, answer_found_rate).
"""

from __future__ import annotations

from pathlib import Path

from tasks.judging.response import PACKAGES
from tasks.runtime.stage import Context, Metrics, stage
from tasks.training.config import LOG_FILE
from tasks.training.grpo_config import GRPOTrainConfig

__all__ = ["GRPOTrainConfig", "grpo_train"]


def _packages(config: GRPOTrainConfig) -> tuple[str, ...]:
    judging = PACKAGES.get(config.kind, ())
    return tuple(dict.fromkeys(("torch", "transformers", *judging, *config.generation.kind.packages)))


def _check(config: GRPOTrainConfig) -> None:
    from tasks.judging.judge import check_judge

    check_judge(config.kind, config.unsafe_code)


@stage(
    kind="checkpoint",
    reads={"student": "student", "data": "rl_data", "validation": "validation_data"},
    gives=("student", "model"),
    log=LOG_FILE,
    packages=_packages,
    check=_check,
    chooses=lambda config: {
        "tasks.sampling.registry:ENGINES": config.generation.engine,
        "tasks.judging.judge:JUDGES": config.kind,
        "tasks.judging.questions:TRUTHS": config.kind,
    },
    fresh_process=lambda config: config.generation.kind.outlives_stage,
)
def grpo_train(
    config: GRPOTrainConfig, context: Context, *, student: Path, data: Path, validation: Path | None = None
) -> Metrics:
    """Train on the problems of `data`; the reference model of the KL term is `student` as it came.

    The share of the problems of `validation` that the student answers rightly is watched.

    Raises:
        StageError: before any training, when data, lengths or engine cannot work, or programs have no sandbox.
    """
    from tasks.judging.judge import open_judge
    from tasks.training.policy_training import train_policy

    with open_judge(config.kind, config.unsafe_code) as judge:
        return train_policy(config, context, student, data, validation, judge)
