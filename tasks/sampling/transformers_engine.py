"""The engine that runs everywhere: a Hugging Face causal language model, decoded in batches by an own loop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from quant.student.linear import materialized
from tasks.checkpoints.models import load_model
from tasks.sampling.decoding import DecodeBatch
from tasks.sampling.engine import (
    Completion,
    EngineOptions,
    OnFinished,
    OnTokens,
    Request,
    SamplingParams,
    Student,
    TokenPair,
    check_lengths,
)
from tasks.sampling.kv_cache import GROUPED_ATTENTION
from tasks.sampling.loglikelihood import check_pairs, model_loglikelihoods


class TransformersEngine:
    """Generates with `model` where it lies, in its dtype; a QAT student is dequantized once per call.

    Args:
        model: a decoder-only model of transformers with full attention (Llama, Qwen2, Qwen3).
        pad_token_id: fills the left of shorter prompts; masked, so any valid id does.
        batch_size: most sequences decoded together.
        token_budget: most cache slots (sequences times prompt plus max_new_tokens) of a batch; a single
            sequence is always admitted.
        autocast: compute in bfloat16 under autocast, as the model is trained.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        pad_token_id: int,
        *,
        batch_size: int = 256,
        token_budget: int = 2**18,
        autocast: bool = False,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; at least one sequence has to fit")
        _check_attention(model)
        self.model = model
        self.pad_token_id = pad_token_id
        self.batch_size = batch_size
        self.token_budget = token_budget
        self.autocast = autocast

    @classmethod
    def open(cls, checkpoint: Path, options: EngineOptions, student: Student | None = None) -> TransformersEngine:
        """On a checkpoint, quantizers of activations and caches included, or on the student where it lies."""
        if student is None:
            model, autocast = load_model(checkpoint, getattr(torch, options.dtype), options.device), False
        else:
            model, autocast = student.model, student.autocast
        pad_token_id = int(model.config.pad_token_id or 0)
        return cls(model, pad_token_id, batch_size=options.batch_size, autocast=autocast)

    def generate(
        self,
        requests: Sequence[Request],
        sampling: SamplingParams,
        on_finished: OnFinished | None = None,
        on_tokens: OnTokens | None = None,
    ) -> list[Completion]:
        """See `Engine.generate`. Same requests and batch settings on one machine: same completions."""
        limit = self.model.config.max_position_embeddings
        check_lengths(requests, limit)
        completions: dict[int, Completion] = {}
        with self._computing():
            for indices in self._batches(requests, sampling):
                batch = DecodeBatch(self.model, self.pad_token_id, indices, requests, sampling, limit)
                for index, completion in batch.run(on_tokens):
                    completions[index] = completion
                    if on_finished is not None:
                        on_finished(index, completion)
        return [completions[index] for index in range(len(requests))]

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """The model without gradients, in evaluation mode, its weights dequantized once."""
        autocast = torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.autocast)
        with autocast, torch.no_grad(), _evaluating(self.model), materialized(self.model):
            yield

    def _batches(self, requests: Sequence[Request], sampling: SamplingParams) -> Iterator[list[int]]:
        """Indices of requests by falling prompt length, equal prompts side by side."""
        order = sorted(range(len(requests)), key=lambda i: (-len(requests[i].prompt_ids), requests[i].prompt_ids, i))
        while order:
            slots = len(requests[order[0]].prompt_ids) + sampling.max_new_tokens
            num_rows = max(1, min(self.batch_size, self.token_budget // slots))
            yield order[:num_rows]
            order = order[num_rows:]

    def loglikelihood(self, pairs: Sequence[TokenPair]) -> list[tuple[float, bool]]:
        """See `Engine.loglikelihood`."""
        check_pairs(pairs, self.model.config.max_position_embeddings)
        with self._computing():
            return model_loglikelihoods(self.model, pairs)

    def load_weights(self, model: nn.Module) -> None:
        """Generate with `model` from now on; it is not copied, so later changes to it show at once."""
        if not isinstance(model, PreTrainedModel):
            raise ValueError(f"load_weights needs a transformers model, got {type(model).__name__}")
        _check_attention(model)
        self.model = model

    def close(self) -> None:
        """Let go of the model."""
        del self.model


def _check_attention(model: PreTrainedModel) -> None:
    kinds = set(getattr(model.config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise ValueError(f"this engine decodes full attention only, the model has {sorted(kinds)}; use vllm")


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode and this engine's attention; both as before on leaving."""
    training = [module for module in model.modules() if module.training]
    attention = model.config._attn_implementation
    model.eval()
    model.set_attn_implementation(GROUPED_ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(attention)
        for module in training:
            module.training = True
