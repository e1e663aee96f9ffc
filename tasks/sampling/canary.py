"""A check that an engine computes with the weights it was given: the log-probabilities of a fixed prompt."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from quant.student.linear import materialized

NUM_TOKENS = 32
# Mean difference per token of two right implementations on a fixed prompt: 1e-4 in float32; about 0.1 in
# bfloat16, on random tokens of log-probability near -12. Stale weights after a visible update give more.
TOLERANCE = {"float32": 0.005, "bfloat16": 0.3, "float16": 0.1}


class StaleWeightsError(RuntimeError):
    """The engine does not compute with the weights that it was given."""


def canary_prompt(vocabulary_size: int, max_length: int) -> list[int]:
    """The fixed prompt, at most `max_length` tokens."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary_size, (min(NUM_TOKENS, max_length),), generator=generator).tolist()


def check_canary(found: Sequence[float], model: PreTrainedModel, prompt: Sequence[int], dtype: str) -> None:
    """Compare the engine's log-probabilities of prompt[1:], each given those before it, with `model`'s.

    Raises StaleWeightsError if they differ by more than computing in `dtype` explains.
    """
    expected = _prompt_logprobs(model, list(prompt))
    difference = sum(abs(a - b) for a, b in zip(found, expected, strict=True)) / len(expected)
    if not difference <= TOLERANCE[dtype]:
        raise StaleWeightsError(
            f"after loading weights, vLLM's log-probabilities of a fixed prompt differ from the model's by "
            f"{difference:.3g} per token; {TOLERANCE[dtype]} is allowed in {dtype}. Open a new engine on a saved "
            "checkpoint, or use the transformers engine"
        )


@torch.no_grad()
def _prompt_logprobs(model: PreTrainedModel, ids: list[int]) -> list[float]:
    training = model.training
    model.eval()
    with materialized(model):
        logits_TV = model(torch.tensor([ids], device=model.device), use_cache=False).logits[0, :-1]
    model.train(training)
    target_T1 = torch.tensor(ids[1:], device=logits_TV.device)[:, None]
    return logits_TV.float().log_softmax(-1).gather(1, target_T1).squeeze(1).tolist()
