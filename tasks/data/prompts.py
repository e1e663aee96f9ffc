"""Turning problems and traces into tokens, the same way for calibration, training, rollouts and evaluation.

No system prompt is ever added (ruikangliu/Quantized-Reasoning-Models:inference.py, the evaluation code that the paper
builds on), and the chat template is the only source of special tokens: where it writes the BOS token itself, the
tokenizer must not add a second one.  Templates are rendered by `templates.py`, with a stopped clock.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tasks.data.templates import PROBE_ASSISTANT, PROBE_USER, chat_template, render
from tasks.runtime.stage import StageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

THINK_OPEN = "<think>"


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: str, enable_thinking: bool | None = None, suffix: str = ""
) -> list[int]:
    """Token ids of one user turn `prompt + suffix`, up to and including the generation prompt.

    `enable_thinking` is handed to templates that know the switch (Qwen3); None leaves the template's default.
    Raises StageError for a tokenizer without chat template or without that switch, ValueError for an empty prompt.
    """
    return _tokens(tokenizer, render_prompt(tokenizer, prompt, enable_thinking, suffix))


def encode_example(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    response: str,
    enable_thinking: bool | None = None,
    suffix: str = "",
) -> tuple[list[int], int]:
    """(input_ids, prompt_length) of a problem with its response; the response ends with the turn-end token.

    Prompt and response are tokenized apart, so that the prompt's tokens are exactly those `encode_prompt` gives and no
    token straddles the border.  An empty prompt means plain text: all tokens count (prompt_length 0), a BOS comes first
    if the tokenizer has one, and no turn end is added because a text window is no finished turn.
    """
    if not prompt:
        bos = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
        return bos + _tokens(tokenizer, response), 0
    prompt_text, response_text = render_example(tokenizer, prompt, response, enable_thinking, suffix)
    prompt_ids = _tokens(tokenizer, prompt_text)
    return prompt_ids + _tokens(tokenizer, response_text), len(prompt_ids)


def render_example(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    response: str,
    enable_thinking: bool | None = None,
    suffix: str = "",
) -> tuple[str, str]:
    """(prompt text, response text with its turn end); an empty prompt gives ("", response).

    The response is not passed through the template: the Qwen3 and R1 templates rewrite or drop the reasoning of
    assistant turns.  Templates that open `<think>` in the generation prompt (R1) get the response without its own.
    """
    if not prompt:
        return "", response
    prompt_text = render_prompt(tokenizer, prompt, enable_thinking, suffix)
    if opens_reasoning(prompt_text) and response.startswith(THINK_OPEN):
        response = response[len(THINK_OPEN) :]
        if prompt_text.endswith("\n"):
            response = response.lstrip("\n")
    end = turn_end(tokenizer)
    return prompt_text, response if response.rstrip().endswith(end) else response + end


def render_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: str, enable_thinking: bool | None = None, suffix: str = ""
) -> str:
    """The text of one user turn with the generation prompt; raises as `encode_prompt` does."""
    if not prompt:
        raise ValueError("the prompt is empty: plain text has no chat form, use encode_example(tokenizer, '', text)")
    switches: dict[str, Any] = {}
    if enable_thinking is not None:
        if "enable_thinking" not in chat_template(tokenizer):
            raise StageError("this model's chat template has no enable_thinking switch: leave enable_thinking unset")
        switches["enable_thinking"] = enable_thinking
    return render(tokenizer, [{"role": "user", "content": prompt + suffix}], add_generation_prompt=True, **switches)


def opens_reasoning(prompt_text: str) -> bool:
    """Whether the prompt ends inside the reasoning, as that of DeepSeek-R1's template does."""
    return prompt_text.rstrip().endswith(THINK_OPEN)


def turn_end(tokenizer: PreTrainedTokenizerBase) -> str:
    """The special token with which the template closes an assistant turn, else the tokenizer's EOS.

    Raises StageError if there is neither.
    """
    conversation = [{"role": "user", "content": PROBE_USER}, {"role": "assistant", "content": PROBE_ASSISTANT}]
    tail = render(tokenizer, conversation, add_generation_prompt=False).rpartition(PROBE_ASSISTANT)[2].lstrip()
    added = tokenizer.added_tokens_decoder.values()
    special = [token.content for token in added if token.special and tail.startswith(token.content)]
    if special:
        return max(special, key=len)
    if tokenizer.eos_token is None:
        raise StageError("the tokenizer has no EOS token: set eos_token in tokenizer_config.json")
    return str(tokenizer.eos_token)


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
