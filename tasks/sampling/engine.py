"""An engine as whoever samples sees it: requests of token ids in, completions of token ids out.

Importing this loads no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class SamplingParams:
    """How to pick tokens. Temperature 0 is greedy decoding (top_p has no effect then)."""

    temperature: float
    top_p: float
    max_new_tokens: int
    stop_token_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature is {self.temperature}; use 0 for greedy decoding or a positive number")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; use a number in (0, 1], 1 keeps every token")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; at least 1 token has to be generated")


@dataclass(frozen=True)
class Request:
    """A prompt and the seed of its own random stream: same seed, same draws, wherever it is batched."""

    prompt_ids: tuple[int, ...]
    seed: int

    def __post_init__(self) -> None:
        if not self.prompt_ids:
            raise ValueError("a request needs at least one prompt token; was the prompt template empty?")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"request seed is {self.seed}; seeds are integers from 0 to 2**63 - 1")


@dataclass(frozen=True)
class Completion:
    """The generated tokens, the stop token included.

    `logprobs` are those of the sampled tokens under softmax(logits / temperature) in float32, before the
    top-p cut; at temperature 0 under softmax(logits). An engine that cannot report them gives NaN.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason


@dataclass(frozen=True)
class EngineOptions:
    """How an engine is to be opened; each takes of it what it knows."""

    max_model_len: int
    """Context limit in tokens, prompt and completion together, at which vLLM reserves its cache."""
    dtype: str = "bfloat16"
    """A torch dtype's name."""
    device: str = "cpu"
    """Where the transformers engine computes; vLLM takes the device it was built for."""
    batch_size: int = 256
    """Most sequences decoded together."""
    tensor_parallel: int = 1
    gpu_memory_utilization: float = 0.9


@dataclass(frozen=True)
class Student:
    """A model in training, with whose present weights an engine generates."""

    model: PreTrainedModel
    autocast: bool
    """It is trained under bfloat16 autocast."""


TokenPair = tuple[tuple[int, ...], tuple[int, ...]]
"""Tokens of a context and of a continuation."""
OnFinished = Callable[[int, Completion], None]
OnTokens = Callable[[], None]


class Engine(Protocol):
    """Generates completions and scores given ones; the order of the answers is that of the requests."""

    def generate(
        self,
        requests: Sequence[Request],
        sampling: SamplingParams,
        on_finished: OnFinished | None = None,
        on_tokens: OnTokens | None = None,
    ) -> list[Completion]:
        """Complete every request; `on_finished(index, completion)` is called as each one ends.

        `on_tokens()` is called when new tokens have arrived, at the latest after 64 of a request: a sign of life.
        A completion also ends, with "length", where prompt and completion reach the model's context limit.
        Raises ValueError before any computation if a prompt leaves no room for one new token.
        """
        ...

    def loglikelihood(self, pairs: Sequence[TokenPair]) -> list[tuple[float, bool]]:
        """log p(continuation | context) in nats and whether no token is more probable than any of the continuation's.

        Raises ValueError before any computation if a context or continuation is empty, or both exceed the context
        limit.
        """
        ...

    def load_weights(self, model: nn.Module) -> None:
        """Generate with the present weights of `model` (its dequantized weights, if it is a QAT student)."""
        ...

    def close(self) -> None:
        """Free the engine's memory; it cannot be used afterwards."""
        ...


def check_lengths(requests: Sequence[Request], limit: int) -> None:
    """Refuse prompts that fill the context of `limit` tokens."""
    too_long = [i for i, request in enumerate(requests) if len(request.prompt_ids) >= limit]
    if too_long:
        first = len(requests[too_long[0]].prompt_ids)
        raise ValueError(
            f"{len(too_long)} of {len(requests)} prompts leave no room to generate: request {too_long[0]} has "
            f"{first} tokens and the context limit is {limit}; drop or shorten them, or raise the limit"
        )
