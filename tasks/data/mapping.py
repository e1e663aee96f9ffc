"""From a row to an example, by the fields that say which column is what."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tasks.data.boxes import last_boxed
from tasks.data.fields import Example, FieldMap, Row, value_at
from tasks.data.values import (
    Dropped,
    Note,
    Reason,
    RowDroppedError,
    ValueKindError,
    conversation,
    is_missing,
    kind_of,
    question,
    reply,
    text_of,
    with_reasoning,
)
from tasks.data.wording import listed, shorten
from tasks.runtime.stage import StageError

INPUT_SEPARATOR = "\n\n"
"""Between an instruction and its input."""


def to_example(row: Row, fields: FieldMap, index: int, notes: set[Note] | None = None) -> Example | Dropped:
    """The row as an example, or why it makes none; `notes` collects what was changed in it.

    StageError names the column of a value that means no text.
    """
    notes = set() if notes is None else notes
    try:
        return _example(row, fields, index, notes)
    except RowDroppedError as dropped:
        return Dropped(dropped.reason)


def _example(row: Row, fields: FieldMap, index: int, notes: set[Note]) -> Example:
    def text(field: str, numbers: bool = True) -> str:
        column = getattr(fields, field)
        return _text(value_at(row, column), field, column, notes, numbers)

    identity = text("id").strip() or str(index)
    if fields.text is not None:
        return Example(identity, "", _needed(text("text", numbers=False), "no_text"), "", "")
    prompt = _needed(_prompt(row, fields, notes), "no_prompt")
    if fields.input is not None and (given := text("input")).strip():
        prompt += INPUT_SEPARATOR + given
    response = _response(row, fields, notes)
    answer = "" if fields.answer is None else _needed(_answer(row, fields, notes), "no_answer")
    choices = [
        _needed(_text(value_at(row, column), "choices", column, notes), "no_choice") for column in fields.choices
    ]
    details = json.dumps({"choices": choices}, ensure_ascii=False) if choices else ""
    return Example(identity, prompt, response, answer, text("tier"), details)


def _prompt(row: Row, fields: FieldMap, notes: set[Note]) -> str:
    value = value_at(row, fields.prompt)
    if messages := _conversation(value, "prompt", fields.prompt):
        return question(messages, notes)
    return _text(value, "prompt", fields.prompt, notes, numbers=False)


def _response(row: Row, fields: FieldMap, notes: set[Note]) -> str:
    if fields.response is None:
        return ""
    value = value_at(row, fields.response)
    if fields.verified_by:
        return _verified(row, value, fields, notes)
    response = _needed(_said(value, "response", fields.response, notes), "no_response")
    if fields.reasoning is None:
        return response
    reasoning = _text(value_at(row, fields.reasoning), "reasoning", fields.reasoning, notes, numbers=False)
    return with_reasoning(_needed(reasoning, "no_reasoning"), response)


def _verified(row: Row, generations: Any, fields: FieldMap, notes: set[Note]) -> str:
    """The first generation that is marked as right."""
    if not is_missing(generations) and not isinstance(generations, list | tuple):
        raise _no_text(generations, "response", fields.response)
    for column in fields.verified_by:
        marks = row.get(column)
        for generation, is_correct in zip(generations or (), marks if isinstance(marks, list) else (), strict=False):
            if is_correct is True and not is_missing(generation):
                return _text(generation, "response", fields.response, notes, numbers=False)
    raise RowDroppedError("no_verified_response")


def _answer(row: Row, fields: FieldMap, notes: set[Note]) -> str:
    text = _said(value_at(row, fields.answer), "answer", fields.answer, notes)
    if fields.answer_rule == "hash":
        return text.rpartition("####")[2].strip().replace(",", "") if "####" in text else ""
    return (last_boxed(text) or "") if fields.answer_rule == "boxed" else text


def _said(value: Any, field: str, column: str | None, notes: set[Note]) -> str:
    """A text, or what the assistant says in a conversation."""
    if messages := _conversation(value, field, column):
        return reply(messages, notes)
    return _text(value, field, column, notes)


def _needed(text: str, reason: Reason) -> str:
    if not text.strip():
        raise RowDroppedError(reason)
    return text


def _conversation(value: Any, field: str, column: str | None) -> Any:
    try:
        return conversation(value)
    except ValueKindError as error:
        raise StageError(
            f"column {_named(field, column)} holds {error}: save the data as JSON Lines or parquet"
        ) from None


def _text(value: Any, field: str, column: str | None, notes: set[Note], numbers: bool = True) -> str:
    try:
        return text_of(value, notes, numbers)
    except ValueKindError:
        raise _no_text(value, field, column) from None


def _no_text(value: Any, field: str, column: str | None) -> StageError:
    message = f"column {_named(field, column)} holds a value of kind {kind_of(value)!r}, no text: name "
    if isinstance(value, Mapping) and value:
        return StageError(
            f"{message}a field in it ({listed((f'{column}.{key}' for key in value), 60)}) or another column"
        )
    return StageError(f"{message}another column, or write it as text")


def _named(field: str, column: str | None) -> str:
    return f"{shorten(column, 40)!r} ({field}_field)"
