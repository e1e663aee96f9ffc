"""From the columns of a data set to examples: which column is what, for well-known data sets and for any other."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any, Literal

from tasks.runtime.stage import StageError

Row = Mapping[str, Any]
AnswerRule = Literal["column", "hash", "boxed"]


@dataclass(frozen=True)
class Example:
    """One row of a dataset artifact; plain text has prompt "" and its text as response."""

    id: str
    prompt: str
    response: str
    answer: str
    tier: str
    details: str = ""
    """JSON with what a kind of task needs besides, e.g. {"choices": [...]}, the right one first; "" for nothing."""


@dataclass(frozen=True)
class FieldMap:
    """Which columns make an example.  None: the example has none of it."""

    prompt: str | None = None
    response: str | None = None
    answer: str | None = None
    text: str | None = None
    """Plain text: becomes the response of an example without prompt; excludes the others."""
    reasoning: str | None = None
    """Text before `</think>` where a trace is kept in two columns; the response is then what follows it."""
    tier: str | None = None
    id: str | None = None
    choices: tuple[str, ...] = ()
    """The columns of a multiple-choice problem's options, the right one first."""
    answer_rule: AnswerRule = "column"
    """"column": the answer column as it is; "hash": what follows `####` in it; "boxed": its last \\boxed{}."""
    verified_by: tuple[str, ...] = ()
    """Boolean list columns beside a list-valued response: the first generation that one of them marks true is taken."""


# Columns as published on the hub, with the licence the data set's own page states.
PRESETS: dict[str, FieldMap] = {
    "openr1_math": FieldMap(
        prompt="problem",
        response="generations",
        answer="answer",
        id="uuid",
        verified_by=("correctness_math_verify", "correctness_llama"),
    ),
    "numinamath_1_5": FieldMap(prompt="problem", response="solution", answer="answer"),
    "gsm8k": FieldMap(prompt="question", response="answer", answer="answer", answer_rule="hash"),
    "math": FieldMap(prompt="problem", response="solution", answer="solution", tier="level", answer_rule="boxed"),
    "wikitext2": FieldMap(text="text"),
    "traces": FieldMap(prompt="problem", response="response", answer="answer", reasoning="reasoning", id="id"),
}
HUB_PRESETS = {
    "open-r1/openr1-math-220k": "openr1_math",
    "ai-mo/numinamath-1.5": "numinamath_1_5",
    "openai/gsm8k": "gsm8k",
    "eleutherai/hendrycks_math": "math",
    "salesforce/wikitext": "wikitext2",
}
LICENCES = {
    "openr1_math": "Apache-2.0",
    "numinamath_1_5": "Apache-2.0",
    "gsm8k": "MIT",
    "math": "MIT",
    "wikitext2": "CC BY-SA 3.0 and GFDL",
}
# What columns are usually called, most telling first; used where neither a preset nor a field is given.
_USUAL = {
    "prompt": ("prompt", "problem", "question", "instruction"),
    "response": ("response", "solution", "output", "completion"),
    "answer": ("answer", "final", "final_answer"),
    "tier": ("tier", "level", "difficulty"),
    "id": ("id", "unique_id", "uuid"),
}


def recognise(row: Row) -> str | None:
    """The preset whose unmistakable traits a row shows, for copies of well-known sets that come without their name."""
    if "generations" in row and "correctness_math_verify" in row:
        return "openr1_math"
    if {"problem", "reasoning", "response", "answer", "id"} <= set(row):
        return "traces"
    if "question" in row and "####" in str(row.get("answer")):
        return "gsm8k"
    if {"problem", "solution", "level"} <= set(row) and "answer" not in row and last_boxed(str(row["solution"])):
        return "math"
    return None


def choose_fields(columns: Sequence[str], preset: str | None, given: Mapping[str, str | None]) -> FieldMap:
    """The preset's columns, or the usual names among `columns`, overridden by `given` (fields of FieldMap).

    StageError lists the columns, and the nearest name, if one that was asked for is not there, or none holds a text.
    """
    base = PRESETS[preset] if preset else _usual_fields(columns)
    overrides: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if "answer" in overrides:  # another column is not written as the preset's is
        base = replace(base, answer_rule="column")
    if "response" in overrides:
        base = replace(base, verified_by=())
    if base.id is None:
        base = replace(base, id=next((name for name in _USUAL["id"] if name in columns), None))
    fields = replace(base, **overrides)
    wanted = {
        name: getattr(fields, name) for name in ("prompt", "response", "answer", "text", "reasoning", "tier", "id")
    }
    for name, column in wanted.items():
        if column is not None and column not in columns:
            nearest = get_close_matches(column, columns, n=1, cutoff=0.4)
            hint = f", did you mean {nearest[0]!r}?" if nearest else ""
            raise StageError(
                f"no column {column!r} for {name}_field{hint} (columns: {', '.join(columns)}); set {name}_field"
            )
    if fields.text is None and fields.prompt is None:
        raise StageError(f"no column for the problems (columns: {', '.join(columns)}): set prompt_field, or text_field")
    return fields


def to_example(row: Row, fields: FieldMap, index: int) -> Example | None:
    """The row as an example, or None if it lacks what `fields` asks for (no verified trace, an empty column ...)."""
    identity = str(row.get(fields.id) or index) if fields.id else str(index)
    if fields.text is not None:
        text = row.get(fields.text)
        return Example(identity, "", text, "", "") if text and text.strip() else None
    prompt, response, answer = row.get(fields.prompt or ""), _response(row, fields), _answer(row, fields)
    if not prompt or response is None or answer is None:
        return None
    choices = [row.get(column) for column in fields.choices]
    if not all(choices):
        return None
    tier = row.get(fields.tier) if fields.tier else None
    details = json.dumps({"choices": choices}, ensure_ascii=False) if choices else ""
    return Example(identity, str(prompt), response, answer, "" if tier is None else str(tier), details)


def last_boxed(text: str) -> str | None:
    """The content of the last \\boxed{...} with balanced braces, or None."""
    start = text.rfind("\\boxed{")
    depth = 0
    for position in range(start + len("\\boxed"), len(text) if start >= 0 else 0):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start + len("\\boxed{") : position]
    return None


def _usual_fields(columns: Sequence[str]) -> FieldMap:
    found: dict[str, Any] = {
        name: next((column for column in usual if column in columns), None) for name, usual in _USUAL.items()
    }
    if found["prompt"] is None and "text" in columns:
        return FieldMap(text="text", id=found["id"])
    return FieldMap(**found)


def _response(row: Row, fields: FieldMap) -> str | None:
    if fields.response is None:
        return ""
    value = row.get(fields.response)
    if fields.verified_by:
        return _verified(row, value or (), fields.verified_by)
    if not value:
        return None
    if fields.reasoning is None:
        return str(value)
    reasoning = row.get(fields.reasoning)
    return f"<think>\n{reasoning.strip()}\n</think>\n\n{value}" if reasoning else None


def _verified(row: Row, generations: Sequence[str], verified_by: Sequence[str]) -> str | None:
    for column in verified_by:
        for generation, is_correct in zip(generations, row.get(column) or (), strict=False):
            if is_correct and generation:
                return generation
    return None


def _answer(row: Row, fields: FieldMap) -> str | None:
    if fields.answer is None:
        return ""
    value = row.get(fields.answer)
    if value is None:
        return None
    text = str(value)
    if fields.answer_rule == "hash":
        return text.rpartition("####")[2].strip().replace(",", "") if "####" in text else None
    return last_boxed(text) if fields.answer_rule == "boxed" else text
