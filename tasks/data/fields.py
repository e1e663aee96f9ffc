"""From the columns of a data set to examples: which column is what, for well-known data sets and for any other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any, Literal

from tasks.data.boxes import last_boxed
from tasks.data.wording import listed, shorten
from tasks.runtime.stage import StageError

Row = Mapping[str, Any]
OR = " or "
"""Between the kinds of values of a mixed column."""
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
    """Texts, or conversations, whose question is the prompt."""
    input: str | None = None
    """Text that follows the prompt, as alpaca's input."""
    response: str | None = None
    """Texts, or conversations, whose answer is the response."""
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

    def columns(self, among: Mapping[str, str]) -> list[str]:
        """The columns that are read, of those there are; of A.B the column A."""
        named = (self.prompt, self.input, self.response, self.answer, self.text, self.reasoning, self.tier, self.id)
        wanted = [name for name in (*named, *self.choices, *self.verified_by) if name]
        return list(dict.fromkeys(c for name in wanted for c in (name, name.partition(".")[0]) if c in among))


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
    "prompt": ("prompt", "problem", "question", "instruction", "query", "input"),
    "response": ("response", "solution", "output", "completion", "generated_solution"),
    "answer": ("answer", "final", "final_answer", "expected_answer", "ground_truth"),
    "reasoning": ("reasoning_content", "reasoning"),
    "tier": ("tier", "level", "difficulty"),
    "id": ("id", "unique_id", "uuid"),
}
_USUAL_MESSAGES = ("messages", "conversations", "conversation")
_USUAL_INPUTS = ("input", "context")  # beside an instruction, as alpaca's and dolly's
_PLAIN = {"text", "number", ""}  # kinds of values that can be an id or a tier


def recognise(row: Row) -> str | None:
    """The preset whose unmistakable traits a row shows, for copies of well-known sets that come without their name."""
    if "generations" in row and "correctness_math_verify" in row:
        return "openr1_math"
    if {"problem", "reasoning", "response", "answer", "id"} <= set(row):
        return "traces"
    if "question" in row and "####" in _text(row, "answer"):
        return "gsm8k"
    if {"problem", "solution", "level"} <= set(row) and "answer" not in row and last_boxed(_text(row, "solution")):
        return "math"
    return None


def choose_fields(columns: Mapping[str, str], preset: str | None, given: Mapping[str, str | None]) -> FieldMap:
    """The preset's columns, or the usual names among `columns`, overridden by `given` (fields of FieldMap).

    `columns` says of each what it holds (`values.kind_of`; "" where no row has it).  In `given`, None leaves the choice
    here, and "" says that there is none; A.B is the field B of the objects in column A.

    StageError lists the columns, and the nearest name, if one that was asked for is not there, or none holds a text, or
    there may be responses that nobody has named.
    """
    base = PRESETS[preset] if preset else _usual_fields(columns)
    overrides: dict[str, Any] = {name: value or None for name, value in given.items() if value is not None}
    if "answer" in overrides:  # another column is not written as the preset's is
        base = replace(base, answer_rule="column")
    if "response" in overrides:
        base = replace(base, verified_by=(), reasoning=base.reasoning if preset else None)
    if overrides.get("text"):
        base = FieldMap(id=base.id, tier=base.tier)
    if base.id is None:
        base = replace(base, id=_usual("id", columns))
    fields = replace(base, **overrides)
    for name in ("prompt", "input", "response", "answer", "text", "reasoning", "tier", "id"):
        _check_column(name, getattr(fields, name), columns)
    if fields.text is None and fields.prompt is None:
        raise StageError(f"no column for the problems ({described(columns)}): set prompt_field, or text_field")
    used = {fields.prompt, fields.input, fields.tier, fields.id}
    may_be_responses = [name for name, kind in columns.items() if name not in used and kind not in ("", "number")]
    if (
        fields.text is None
        and not fields.response
        and not fields.answer
        and may_be_responses
        and "response" not in overrides
    ):
        raise StageError(
            f"no column known for responses or answers ({described(columns)}): set response_field or answer_field, or "
            'response_field: "" if problems are all you want'
        )
    return fields


def described(columns: Mapping[str, str]) -> str:
    """The columns with what they hold, for messages."""
    return "columns: " + listed(f"{name} ({kind})" if kind else name for name, kind in columns.items())


def value_at(row: Row, column: str | None) -> Any:
    """The value in a column, or A.B in an object; None where there is none."""
    if column is None or column in row:
        return row.get(column) if column else None
    value: Any = row
    for name in column.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _check_column(field: str, column: str | None, columns: Mapping[str, str]) -> None:
    if column is None or column in columns or ("." in column and column.partition(".")[0] in columns):
        return
    nearest = get_close_matches(column, columns, n=1, cutoff=0.4)
    hint = f", did you mean {shorten(nearest[0], 40)!r}?" if nearest else ""
    raise StageError(
        f"no column {shorten(column, 40)!r} for {field}_field{hint} ({described(columns)}); set {field}_field"
    )


def _usual(field: str, columns: Mapping[str, str], names: Sequence[str] | None = None) -> str | None:
    """The first column with one of a field's usual names, those that hold something before those that are empty."""
    present = [name for name in names or _USUAL[field] if name in columns]
    if field in ("tier", "id"):
        present = [name for name in present if _PLAIN.issuperset(columns[name].split(OR))]
    return next((name for name in present if columns[name]), present[0] if present else None)


def _usual_fields(columns: Mapping[str, str]) -> FieldMap:
    found: dict[str, Any] = {name: _usual(name, columns) for name in _USUAL}
    if found["response"] is None:
        found["reasoning"] = None
        if messages := _messages(columns, found["prompt"]):
            return FieldMap(**found | {"prompt": messages, "response": messages})
    if found["prompt"] is None and "text" in columns:
        return FieldMap(text="text", id=found["id"])
    if found["prompt"] == "instruction":
        found["input"] = _usual("input", columns, _USUAL_INPUTS)
    return FieldMap(**found)


def _messages(columns: Mapping[str, str], prompt: str | None) -> str | None:
    """The column of conversations, by its name or because it is the only one."""
    by_kind = [name for name, kind in columns.items() if kind == "messages" and name != prompt]
    return _usual("messages", columns, _USUAL_MESSAGES) or (by_kind[0] if len(by_kind) == 1 else None)


def _text(row: Row, column: str) -> str:
    value = row.get(column)
    return value if isinstance(value, str) else ""
