"""Chat templates: programs that come with a model, rendered so that the text depends on the conversation alone.

The clock is stopped at DATE, the date that Llama 3's own templates take where they have no clock.  It is part of this
code, so of the key of every stage that renders.  A template that draws at random is refused; one that is broken, or
never ends, or leaves the conversation out, is told before anything is computed with it.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.data.wording import first_line
from tasks.runtime.stage import StageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DATE = datetime(2024, 7, 26)
MOST_CHARS = 100_000
"""That a template may add to a conversation; the longest of known models add some thousands."""
CPU_SECONDS, MEMORY_BYTES = 10, 2**31
"""That a short conversation may take; real templates take milliseconds."""
_WALL_SECONDS = 120  # a busy machine is slow to give the CPU seconds
_PROBE = Path(__file__).with_name("template_probe.py")

PROBE_USER, PROBE_ASSISTANT = "user-turn-probe", "turn-end-probe"
_QUESTION = [{"role": "user", "content": PROBE_USER}]
_ANSWERED = [*_QUESTION, {"role": "assistant", "content": PROBE_ASSISTANT}]
# jinja2's filter and function that draw; transformers offers both to templates.
_RANDOM = re.compile(r"\|\s*random\b|\blipsum\b")
_ADDRESS = re.compile(r" at 0x[0-9a-f]{6,}")
# Templates, with the special tokens that they are given, which this process has checked.
_usable: set[tuple[str, tuple[tuple[str, str], ...]]] = set()
_REMEDY = "mend chat_template.jinja in the model's folder, or take another release of the model"


def chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer's template; StageError where it has none."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        raise StageError(
            "the tokenizer has no chat template: add chat_template.jinja to the model folder, or take the "
            "instruction-tuned release of the model"
        )
    if not isinstance(template, str):
        raise _unusable(f"it is a {type(template).__name__}, not a text")
    return template


def check_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise StageError for a template that cannot be trusted with a conversation; takes some tenths of a second."""
    if fault := _fault(chat_template(tokenizer), _special_tokens(tokenizer)):
        raise _unusable(fault)
    question = _rendered(tokenizer, _QUESTION, add_generation_prompt=True)
    answered = _rendered(tokenizer, _ANSWERED, add_generation_prompt=False)
    if PROBE_USER not in question or PROBE_USER not in answered:
        raise _unusable("it leaves out what the user says")
    if PROBE_ASSISTANT not in answered:
        raise _unusable("it leaves out what the assistant says")
    if _ADDRESS.search(question + answered):
        raise _unusable("it writes addresses of this process's memory, which differ from run to run")


def render(tokenizer: PreTrainedTokenizerBase, conversation: list[dict[str, str]], **switches: Any) -> str:
    """The conversation as text; StageError for a template that cannot be used."""
    special = _special_tokens(tokenizer)
    if (chat_template(tokenizer), special) not in _usable:
        check_chat_template(tokenizer)
        _usable.add((chat_template(tokenizer), special))
    return _rendered(tokenizer, conversation, **switches)


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[str, str], ...]:
    return tuple((name, str(token)) for name, token in tokenizer.special_tokens_map.items())


def _rendered(tokenizer: PreTrainedTokenizerBase, conversation: list[dict[str, str]], **switches: Any) -> str:
    try:
        text = tokenizer.apply_chat_template(conversation, tokenize=False, strftime_now=DATE.strftime, **switches)
    except Exception as error:  # a template is a program: it fails in every way that a program does
        raise _unusable(first_line(error)) from error
    if not isinstance(text, str) or len(text) > MOST_CHARS + sum(len(turn["content"]) for turn in conversation):
        raise _unusable(f"it adds more than {MOST_CHARS:,} characters")
    return text


@lru_cache(maxsize=256)
def _fault(template: str, special_tokens: tuple[tuple[str, str], ...]) -> str:
    """What is wrong with a template as a program; "" for nothing."""
    if _RANDOM.search(template):
        return "it draws at random (random or lipsum), so prompts would differ from run to run"
    switches: list[dict[str, bool]] = [{}]
    if "enable_thinking" in template:
        switches += [{"enable_thinking": True}, {"enable_thinking": False}]
    variables = [
        {"messages": turns, "add_generation_prompt": turns is _QUESTION, **dict(special_tokens), **switch}
        for turns in (_QUESTION, _ANSWERED)
        for switch in switches
    ]
    asked = {
        "template": template,
        "variables": variables,
        "most_chars": MOST_CHARS,
        "cpu_seconds": CPU_SECONDS,
        "memory_bytes": MEMORY_BYTES,
    }
    command = [sys.executable, "-I", str(_PROBE)]
    try:
        done = subprocess.run(command, input=json.dumps(asked), text=True, capture_output=True, timeout=_WALL_SECONDS)
    except subprocess.TimeoutExpired:
        return f"it does not end within {_WALL_SECONDS} seconds"
    if done.returncode == 0:
        return ""
    megabytes = MEMORY_BYTES >> 20
    return f"a short conversation takes it over {CPU_SECONDS} CPU seconds, {megabytes} MiB or {MOST_CHARS:,} characters"


def _unusable(what: str) -> StageError:
    return StageError(f"the model's chat_template cannot be used: {what}; {_REMEDY}")
