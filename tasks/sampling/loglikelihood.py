"""Log-likelihoods of given continuations.

Precision: the model computes in its own dtype; logits are cast to float32, sums over tokens are float64.
Dimensions: B sequences, T tokens, N continuation tokens of the batch, H hidden, V vocabulary.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from tasks.sampling.draws import check_finite
from tasks.sampling.engine import TokenPair

# Tokens per forward pass, padding included: bounds the float32 logits [N, V], 2.5 GB for 150,000 tokens.
PASS_TOKENS = 4096

Steps = Sequence[Mapping[int, Any]]
"""vLLM's Logprob of some tokens, for each place of a prompt; None for the first."""


def check_pairs(pairs: Sequence[TokenPair], limit: int) -> None:
    """Refuse what cannot be scored: nothing to score, nothing before it, or more than `limit` tokens (ValueError)."""
    for index, (context, continuation) in enumerate(pairs):
        if not context or not continuation:
            raise ValueError(f"pair {index}: context and continuation need at least one token each")
        if len(context) + len(continuation) > limit:
            raise ValueError(
                f"pair {index} has {len(context) + len(continuation)} tokens and the limit is {limit}: leave it out, "
                "or raise the engine's context limit"
            )


def model_loglikelihoods(model: PreTrainedModel, pairs: Sequence[TokenPair]) -> list[tuple[float, bool]]:
    """See `Engine.loglikelihood`; `model` is a causal one, in evaluation mode, and gradients are off."""
    found: dict[int, tuple[float, bool]] = {}
    for indices in _passes(pairs):
        scores = _score(model, [pairs[index] for index in indices])
        found.update(zip(indices, scores, strict=True))
    return [found[index] for index in range(len(pairs))]


def _passes(pairs: Sequence[TokenPair]) -> Iterator[list[int]]:
    """Indices by falling length, in groups of at most PASS_TOKENS padded tokens, or of one."""
    length = [len(context) + len(continuation) for context, continuation in pairs]
    order = sorted(range(len(pairs)), key=lambda index: -length[index])
    while order:
        num_rows = max(1, PASS_TOKENS // length[order[0]])
        yield order[:num_rows]
        order = order[num_rows:]


def _score(model: PreTrainedModel, pairs: Sequence[TokenPair]) -> list[tuple[float, bool]]:
    inputs = [(context + continuation)[:-1] for context, continuation in pairs]
    num_steps = max(map(len, inputs))
    # Padded on the right, where causal attention lets nothing see it.
    ids = torch.tensor([[*tokens, *[0] * (num_steps - len(tokens))] for tokens in inputs], device=model.device)
    hidden_BTH = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    predicting = [
        (row, len(context) - 1 + step)
        for row, (context, continuation) in enumerate(pairs)
        for step in range(len(continuation))
    ]
    row_N, step_N = torch.tensor(predicting, device=model.device).unbind(1)
    logits_NV = model.get_output_embeddings()(hidden_BTH[row_N, step_N]).float()
    target_N = torch.tensor([token for _, continuation in pairs for token in continuation], device=model.device)
    logit_N = logits_NV.gather(1, target_N[:, None]).squeeze(1)
    logprob_N = (logit_N - logits_NV.logsumexp(-1)).double().cpu()
    check_finite(logprob_N)
    greedy_N = (logit_N >= logits_NV.amax(-1)).cpu()
    lengths = [len(continuation) for _, continuation in pairs]
    parts = zip(logprob_N.split(lengths), greedy_N.split(lengths), strict=True)
    return [(float(logprobs.sum()), bool(greedy.all())) for logprobs, greedy in parts]


def prompt_loglikelihoods(prompts: Sequence[Steps], pairs: Sequence[TokenPair]) -> list[tuple[float, bool]]:
    """The same from vLLM's `prompt_logprobs`, which hold each token and the most probable one of its place."""
    return [
        _prompt_loglikelihood(steps[-len(continuation) :], continuation)
        for steps, (_, continuation) in zip(prompts, pairs, strict=True)
    ]


def _prompt_loglikelihood(steps: Steps, continuation: Sequence[int]) -> tuple[float, bool]:
    logprobs = [step[token].logprob for token, step in zip(continuation, steps, strict=True)]
    check_finite(torch.tensor(logprobs))
    best = [max(candidate.logprob for candidate in step.values()) for step in steps]
    return math.fsum(logprobs), all(found >= most for found, most in zip(logprobs, best, strict=True))
