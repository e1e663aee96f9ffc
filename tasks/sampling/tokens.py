"""Tokens in and out of a request: seeds, stop tokens, lengths, and the text of a response."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tasks.runtime.stage import StageError


def response_text(tokenizer: Any, token_ids: Sequence[int], stop_token_ids: Sequence[int]) -> str:
    """Generated text without the stop token; other special tokens stay, since `</think>` may be one."""
    ends = bool(token_ids) and token_ids[-1] in stop_token_ids
    return str(tokenizer.decode(list(token_ids[:-1] if ends else token_ids), skip_special_tokens=False))


def request_seed(seed: int, problem_id: str) -> int:
    """Sampling seed of one problem under an evaluation seed, in [0, 2^31).

    A hash, so that a sample does not depend on the order or number of problems and no two seeds overlap.
    """
    hashed = hashlib.sha256(f"{seed}/{problem_id}".encode()).digest()
    return int.from_bytes(hashed[:4], "big") >> 1


def stop_token_ids(checkpoint: Path, tokenizer: Any) -> tuple[int, ...]:
    """End tokens named by generation_config.json, config.json and the tokenizer, sorted.

    Raises:
        StageError: none of them names one, so that every response would run into the token limit.
    """
    found = {tokenizer.eos_token_id}
    for name in ("generation_config.json", "config.json"):
        if (checkpoint / name).exists():
            eos = json.loads((checkpoint / name).read_text()).get("eos_token_id")
            found |= set(eos) if isinstance(eos, list) else {eos}
    found.discard(None)
    if not found:
        raise StageError(f"{checkpoint} names no eos_token_id: add it to generation_config.json")
    return tuple(sorted(found))


def needed_length(prompts: Iterable[tuple[str, Sequence[int]]], max_new_tokens: int, checkpoint: Path) -> int:
    """Tokens that the longest prompt, of (problem id, tokens), and its response may take together.

    Raises:
        StageError: a prompt with max_new_tokens behind it does not fit the model's max_position_embeddings.
    """
    longest, num_prompt_tokens = max(((name, len(ids)) for name, ids in prompts), key=lambda prompt: prompt[1])
    limit = int(json.loads((checkpoint / "config.json").read_text())["max_position_embeddings"])
    if num_prompt_tokens + max_new_tokens <= limit:
        return num_prompt_tokens + max_new_tokens
    remedy = (
        f"set max_new_tokens to {limit - num_prompt_tokens} or less"
        if num_prompt_tokens < limit
        else "leave this problem out of the data"
    )
    raise StageError(
        f"problem {longest!r}: its prompt of {num_prompt_tokens} tokens and max_new_tokens={max_new_tokens} exceed the "
        f"{limit} positions of the model (max_position_embeddings): {remedy}"
    )
