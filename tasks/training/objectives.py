"""What is minimised: SFT, KD and GRPO as modules that map a micro-batch to (loss_sum, metrics).

The student is the only submodule, so that data parallelism and checkpoints see nothing else: a teacher or a reference
model is held outside the module tree.  Batches are those of `batches.collate`; N counts predicted tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tasks.training.config import Direction
from tasks.training.grpo import TokenTerms, policy_loss, policy_metrics
from tasks.training.grpo_config import PolicyConfig
from tasks.training.loop import Batch
from tasks.training.losses import ChunkLoss, cross_entropy, head_loss, kl_divergence, kl_top_k, token_log_probability


def predicting_states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Last hidden states [N, H] at the positions whose next token counts."""
    backbone = model.get_decoder()
    hidden_BTH = backbone(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
    ).last_hidden_state
    return hidden_BTH.flatten(0, 1).index_select(0, batch["positions"])


def head_weight(model: PreTrainedModel) -> Tensor:
    """The head's weight [V, H], be it tied to the embedding or not."""
    head = model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise ValueError(f"{type(model).__name__} has a biased head, which the chunked losses do not know")
    return head.weight


class SFTObjective(nn.Module):
    """Cross entropy on the response tokens (paper, section 3.1)."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        loss, _ = head_loss(
            predicting_states(self.model, batch), head_weight(self.model), cross_entropy(batch["targets"])
        )
        return loss, {}


class KDObjective(nn.Module):
    """KL divergence between the full-precision teacher and the student on the response tokens (paper, section 3.1).

    Without a `teacher` the batches carry its cached log-probabilities: `teacher_values` and `teacher_indices` [N, K].
    """

    def __init__(
        self,
        model: PreTrainedModel,
        teacher: PreTrainedModel | None,
        direction: Direction = "forward",
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        self.model, self.direction, self.temperature = model, direction, temperature
        self._outside = (teacher,)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        loss, _ = head_loss(predicting_states(self.model, batch), head_weight(self.model), self._divergence(batch))
        return loss, {}

    def _divergence(self, batch: Batch) -> ChunkLoss:
        teacher = self._outside[0]
        if teacher is None:
            values, indices = batch["teacher_values"], batch["teacher_indices"]
            return kl_top_k(values, indices, self.direction, self.temperature)
        with torch.no_grad():
            return kl_divergence(
                predicting_states(teacher, batch), head_weight(teacher).detach(), self.direction, self.temperature
            )


class GRPOObjective(nn.Module):
    """The clipped policy-gradient loss of GRPO; see `grpo.policy_loss` and, for the batches, `rollouts`.

    With several updates per rollout the first one records the log-probabilities of the policy that made the rollout, by
    the micro-batch's `slot`, and the later ones take their ratio to them.
    """

    def __init__(self, model: PreTrainedModel, config: PolicyConfig, reference: PreTrainedModel | None = None) -> None:
        super().__init__()
        self.model, self.config = model, config
        self._outside = (reference,)
        self._recorded: dict[int, Tensor] = {}

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        first = int(batch["update"]) == 0
        terms = TokenTerms(
            targets_N=batch["targets"],
            advantages_N=batch["advantages"],
            weights_N=batch["weights"],
            engine_N=batch["engine_logprobs"],
            old_N=None if first else self._recorded[int(batch["slot"])],
            reference_N=self._reference(batch),
        )
        hidden_NH = predicting_states(self.model, batch)
        loss, statistics = head_loss(hidden_NH, head_weight(self.model), policy_loss(terms, self.config))
        if first and self.config.updates_per_rollout > 1:
            self._recorded[int(batch["slot"])] = statistics["logprob"]
        return loss, policy_metrics(statistics, terms, self.config)

    def _reference(self, batch: Batch) -> Tensor | None:
        """Log-probabilities [N] under the reference model."""
        reference = self._outside[0]
        if reference is None:
            return None

        def loss(logits_CV: Tensor, tokens: slice) -> tuple[Tensor, dict[str, Tensor]]:
            value = token_log_probability(logits_CV / self.config.generation.temperature, batch["targets"][tokens])
            return value, {"logprob": value}

        with torch.no_grad():
            _, statistics = head_loss(predicting_states(reference, batch), head_weight(reference), loss)
        return statistics["logprob"]
