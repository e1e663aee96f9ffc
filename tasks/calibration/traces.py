"""The texts of a calibration: the model's own traces, or what the data set gives."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from tasks.calibration.config import CalibrateConfig
from tasks.data.fields import Example
from tasks.data.prompts import encode_example, encode_prompt, render_example
from tasks.runtime.stage import Context, StageError
from tasks.sampling.engine import Request
from tasks.sampling.journal import Generation
from tasks.sampling.open import open_sampler, sampling_params
from tasks.sampling.sampler import Tally
from tasks.sampling.tokens import needed_length, stop_token_ids

# Keeps the streams of different seeds apart.
_SEED_STRIDE = 1_000_003


@dataclass(frozen=True)
class Trace:
    """A problem with its response, or a plain text: as text for crops, as tokens for padded examples."""

    text: str
    ids: list[int]


def choose(examples: list[Example], config: CalibrateConfig) -> list[Example]:
    """All examples for crops, else as many as there are to be sequences.  StageError if there are too few."""
    if config.packing == "crops":
        return examples
    if len(examples) < config.num_sequences:
        raise StageError(
            f"calibration wants {config.num_sequences} sequences of one example each, the data set has "
            f"{len(examples)}: lower num_sequences, or raise the data set's num_examples"
        )
    indices = sorted(random.Random(config.seed).sample(range(len(examples)), config.num_sequences))
    return [examples[index] for index in indices]


def make(
    examples: Sequence[Example],
    config: CalibrateConfig,
    context: Context,
    base: Path,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[list[Trace], dict[str, Any]]:
    """A trace of every example, and figures about them."""
    if config.responses == "given":
        return _given(examples, config, tokenizer), {}
    return _generated(examples, config, context, base, tokenizer)


def _given(examples: Sequence[Example], config: CalibrateConfig, tokenizer: PreTrainedTokenizerBase) -> list[Trace]:
    bare = sum(not example.response for example in examples)
    if bare:
        raise StageError(
            f"{bare} of {len(examples)} examples have no response to calibrate on: set responses=generated, or "
            "response_field for the data set"
        )
    options = (config.generation.enable_thinking, config.generation.prompt_suffix)
    return [
        Trace(
            "".join(render_example(tokenizer, example.prompt, example.response, *options)),
            encode_example(tokenizer, example.prompt, example.response, *options)[0],
        )
        for example in examples
    ]


def _generated(
    examples: Sequence[Example],
    config: CalibrateConfig,
    context: Context,
    base: Path,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[list[Trace], dict[str, Any]]:
    """The model's own traces, stop tokens included."""
    requests = _requests(examples, config, tokenizer)
    names = [example.id for example in examples]
    sampled = _sample(requests, names, config, context, base, tokenizer)
    traces = []
    for request, generation in zip(requests, sampled, strict=True):
        ids = [*request.prompt_ids, *generation.token_ids]
        traces.append(Trace(str(tokenizer.decode(ids, skip_special_tokens=False)), ids))
    num_tokens = sum(len(generation.token_ids) for generation in sampled)
    num_truncated = sum(generation.finish_reason == "length" for generation in sampled)
    return traces, {"num_generated_tokens": num_tokens, "num_truncated": num_truncated}


def _requests(
    examples: Sequence[Example], config: CalibrateConfig, tokenizer: PreTrainedTokenizerBase
) -> list[Request]:
    options = (config.generation.enable_thinking, config.generation.prompt_suffix)
    requests = []
    for index, example in enumerate(examples):
        if not example.prompt:
            raise StageError("the data set is plain text, which has no problems to answer: set responses=given")
        prompt_ids = encode_prompt(tokenizer, example.prompt, *options)
        requests.append(Request(tuple(prompt_ids), seed=config.seed * _SEED_STRIDE + index))
    return requests


def _sample(
    requests: Sequence[Request],
    names: Sequence[str],
    config: CalibrateConfig,
    context: Context,
    base: Path,
    tokenizer: PreTrainedTokenizerBase,
) -> list[Generation]:
    """Generations in the requests' order, a full batch of every engine at a time: a resumed stage batches alike."""
    generation = config.generation
    prompts = zip(names, (request.prompt_ids for request in requests), strict=True)
    length = needed_length(prompts, generation.max_new_tokens, base)
    sampling = sampling_params(generation, stop_token_ids(base, tokenizer))
    size = generation.batch_size * generation.data_parallel
    tally = Tally(len(requests), lambda done, total, **info: context.progress(done, total, "problem", **info))
    sampled: list[Generation] = []
    with open_sampler(generation, sampling, base, context, length) as sampler:
        for start in range(0, len(requests), size):
            part = slice(start, start + size)
            answers = sampler.sample(requests[part], names[part], tally, together=True)
            sampled += [answer for answer, _ in answers]
    return sampled
