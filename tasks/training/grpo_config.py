"""Configuration of GRPO; importing it loads no torch."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from tasks.judging.response import JudgedKind
from tasks.runtime.bounds import Count, NonNegative, Positive, Rate, Whole
from tasks.sampling.config import RolloutGeneration
from tasks.training.config import LoopConfig, StudentConfig

Normalization = Literal["grpo", "dapo", "dr_grpo"]


class PolicyConfig(LoopConfig):
    """The policy-gradient loss.  The paper gives the group size and the correctness reward; the rest is choice."""

    group_size: Annotated[Count, Field(ge=2)] = 8
    generation: RolloutGeneration = RolloutGeneration()
    """How completions are sampled; the loss is that of the distribution that its temperature gives."""
    clip_low: Annotated[Positive, Field(lt=1)] = 0.2
    clip_high: Positive = 0.2
    beta: NonNegative = 0.0
    """Weight of the KL to the model that training started from; 0 needs no reference model."""
    updates_per_rollout: Count = 1
    loss_normalization: Normalization = "grpo"
    """grpo: mean over sequences of their token means; dapo: mean over tokens; dr_grpo: sum over a constant length."""
    scale_by_std: bool = True
    """Divide advantages by the group's standard deviation (Dr. GRPO, arXiv 2503.20783, does not)."""
    mask_truncated: bool = False
    """Completions that hit the token limit give no gradient (DAPO, arXiv 2503.14476, section 3.4)."""
    drop_zero_variance: bool = False
    """Leave groups with equal rewards out of the step and its denominator; they are counted either way."""
    importance_sampling: bool = False
    """Weight tokens by min(policy / engine probability, cap), token-level truncated importance sampling."""
    importance_cap: Positive = 2.0

    @property
    def resumable_every(self) -> int:
        """Only where a rollout begins: its completions are not saved."""
        return self.updates_per_rollout


class RolloutConfig(PolicyConfig):
    """`batch_size` counts completions: batch_size / group_size prompts a step."""

    samples_every: Count = 1
    """Steps between the sample completions that are kept, counted in optimizer steps."""
    num_samples: Whole = 2

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


class GRPOTrainConfig(StudentConfig, RolloutConfig):
    steps: Count = 250
    learning_rate: Rate = 5e-7
    transform_learning_rate: Rate = 2.5e-5
    clip_learning_rate: Rate = 2.5e-4
    warmup_steps: Whole = 8
    batch_size: Count = 64
    micro_batch_size: Count = 16
    checkpoint_every: Count = 10
    validate_every: Count = 25
    max_prompt_length: Count = 1024
    """Problems with more prompt tokens are left out, and counted."""
    kind: JudgedKind = "math"
    """How problems are asked and completions judged, as in evaluation; for code `rl_data` holds tests, as the data set
    of the benchmark livecodebench_v4_v5 does."""
    unsafe_code: bool = False
    """Run generated programs without a sandbox, with your own rights."""
