"""From a value in a column to the text it means, or a word on why it means none.  Never by str() of a structure.

- Numbers are their plain decimal notation: 4 is "4", 4.0 is "4.0", 1e22 has all its digits.  NaN is a missing value.
- A list of one text or number is that text; of several, the row is ambiguous.
- A conversation (OpenAI's role and content, content also as text parts; ShareGPT's from and value) is one question and
  its answer.  System messages are left out, as everywhere in this project (`prompts.py`), and counted.  A conversation
  of several questions is no problem with a response: its row is dropped.
- Booleans, dates, bytes and objects mean no text, and are refused: another column, or a field of the object, may.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal

Reason = Literal[
    "no_prompt", "no_response", "no_answer", "no_reasoning", "no_text", "no_choice", "no_verified_response",
    "several_values", "multi_turn", "no_user_turn", "no_assistant_turn", "tool_calls", "not_only_text", "other_role",
]  # fmt: skip
"""Why a row is dropped, as dataset.json counts it."""
Note = Literal["system_messages_left_out", "half_surrogates_replaced"]
"""What was changed in a row that is kept; functions here add to the notes of the row at hand."""

ROLES = {
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "system": "system", "developer": "system",
    "tool": "tool", "function": "tool", "function_call": "tool", "function_response": "tool", "observation": "tool",
}  # fmt: skip
# A conversation written as text, as csv files hold them.
_WRITTEN_TURNS = re.compile(r"""\s*\[\s*\{\s*['"](role|content|from|value)['"]\s*:""")
_SURROGATE = re.compile("[\ud800-\udfff]")
_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True)
class Dropped:
    """In place of an example: why its row makes none."""

    reason: Reason


class RowDroppedError(Exception):
    """This row makes no example; others may."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason)
        self.reason = reason


class ValueKindError(ValueError):
    """A column holds values of a kind that means no text; the message names the kind."""


@dataclass(frozen=True)
class Turn:
    role: str
    text: str
    reasoning: str = ""


def kind_of(value: Any) -> str:
    """What a value is, in the words of messages; "" for a missing one."""
    if is_missing(value):
        return ""
    if isinstance(value, str):
        return "text"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int | float | Decimal):
        return "number"
    if is_conversation(value):
        return "messages"
    if isinstance(value, Mapping):
        return "object"
    if isinstance(value, list | tuple):
        return f"list of {kind_of(value[0]) or 'nothing'}"
    return type(value).__name__


def is_missing(value: Any) -> bool:
    if isinstance(value, str):
        return not value.strip()
    return value is None or value != value or (isinstance(value, list | tuple) and not value)


def text_of(value: Any, notes: set[Note], numbers: bool = True) -> str:
    """The text that a value means; "" for a missing one.  Conversations are not read here, see `question`, `reply`.

    `numbers`: whether a number can be meant, as in answers, unlike problems.

    Raises:
        RowDroppedError: a list of several texts.
        ValueKindError: see the module's docstring.
    """
    if isinstance(value, str):
        return _whole(value, notes)
    if is_missing(value):
        return ""
    if numbers and isinstance(value, int | float | Decimal) and not isinstance(value, bool):
        return _decimal(value)
    if isinstance(value, list | tuple) and all(isinstance(v, str | int | float | Decimal) for v in value):
        if len(value) > 1:
            raise RowDroppedError("several_values")
        return text_of(value[0], notes, numbers)
    raise ValueKindError(kind_of(value))


def words(row: Mapping[str, Any], column: str) -> str:
    """The text in a column that must have one; KeyError or TypeError where it has none."""
    value = row[column]
    if not isinstance(value, str):
        raise TypeError(f"column {column} holds a value of kind {kind_of(value)!r}, no text")
    return value


def identity(row: Mapping[str, Any], column: str, index: int) -> str:
    """A row's own id, else its number."""
    return text_of(row.get(column), set()).strip() or str(index)


def is_conversation(value: Any) -> bool:
    """Whether a value is a list of messages."""
    if not isinstance(value, list | tuple) or not value:
        return False
    return all(
        isinstance(m, Mapping) and ({"role", "content"} <= m.keys() or {"from", "value"} <= m.keys()) for m in value
    )


def conversation(value: Any) -> Sequence[Mapping[str, Any]] | None:
    """The messages that a value holds, also where they are written as JSON; None for any other value.

    Raises ValueKindError for messages written in another way, e.g. as Python does.
    """
    if isinstance(value, str) and _WRITTEN_TURNS.match(value):
        try:
            value = json.loads(value)
        except ValueError:
            raise ValueKindError("messages written as text, not as JSON") from None
    return value if is_conversation(value) else None


def question(messages: Sequence[Mapping[str, Any]], notes: set[Note]) -> str:
    """What the user asks, in a conversation of one question with or without its answer."""
    return _one_exchange(messages, notes)[0]


def reply(messages: Sequence[Mapping[str, Any]], notes: set[Note]) -> str:
    """What the assistant says, its reasoning in a think block; messages without the user's turn are allowed."""
    answer = _one_exchange(messages, notes)[1]
    if answer is None:
        raise RowDroppedError("no_assistant_turn")
    return with_reasoning(answer.reasoning, answer.text) if answer.reasoning.strip() else answer.text


def with_reasoning(reasoning: str, response: str) -> str:
    """A response with the reasoning that led to it; one that has its reasoning already stays as it is."""
    return response if "</think>" in response else f"<think>\n{reasoning.strip()}\n</think>\n\n{response}"


def _one_exchange(messages: Sequence[Mapping[str, Any]], notes: set[Note]) -> tuple[str, Turn | None]:
    turns = [_turn(message, notes) for message in messages]
    spoken = [turn for turn in turns if turn.role != "system"]
    roles = [turn.role for turn in spoken]
    if roles == ["assistant"]:
        asked, answer = "", spoken[0]
    elif roles == ["user"]:
        asked, answer = spoken[0].text, None
    elif roles == ["user", "assistant"]:
        asked, answer = spoken[0].text, spoken[1]
    else:
        raise RowDroppedError("multi_turn" if "user" in roles else "no_user_turn")
    if len(spoken) < len(turns):
        notes.add("system_messages_left_out")
    return asked, answer


def _turn(message: Mapping[str, Any], notes: set[Note]) -> Turn:
    name = message.get("role") or message.get("from")
    role = ROLES.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        raise RowDroppedError("other_role")
    if role == "tool" or message.get("tool_calls") or message.get("function_call"):
        raise RowDroppedError("tool_calls")
    content = message.get("content")
    text = _content(message.get("value") if content is None else content, notes)
    reasoning = next((message[key] for key in _REASONING_KEYS if isinstance(message.get(key), str)), "")
    return Turn(role, text, _whole(reasoning, notes))


def _content(content: Any, notes: set[Note]) -> str:
    """The text of a message, which may come in parts."""
    if content is None:
        return ""
    if isinstance(content, str):
        return _whole(content, notes)
    parts = content if isinstance(content, list | tuple) else [content]
    texts = [part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise RowDroppedError("not_only_text")
    return "".join(_whole(str(text), notes) for text in texts)


def _whole(text: str, notes: set[Note]) -> str:
    """Without halves of surrogate pairs, which no encoding can hold."""
    if text.isascii() or not _SURROGATE.search(text):
        return text
    notes.add("half_surrogates_replaced")
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _decimal(number: int | float | Decimal) -> str:
    if isinstance(number, int):
        return str(number)
    if not math.isfinite(number):
        raise ValueKindError("infinity")
    written = str(number)
    return format(Decimal(written), "f") if "e" in written.lower() else written
