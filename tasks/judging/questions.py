"""From a problem to what is asked of a model, for each kind of task whose responses are judged."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass

from tasks.judging.choice_answer import LETTERS
from tasks.judging.response import JudgedKind
from tasks.runtime.stage import StageError

# As worded by github.com/openai/simple-evals (common.py), and taken over by the harness that the paper builds on.
CHOICE_PROMPT = (
    "Answer the following multiple choice question. The last line of your response should be of the following format: "
    "'Answer: $LETTER' (without quotes) where LETTER is one of ABCD. Think step by step before answering.\n\n"
    "{question}\n\nA) {A}\nB) {B}\nC) {C}\nD) {D}"
)


@dataclass(frozen=True)
class Problem:
    id: str
    prompt: str
    answer: str
    tier: str
    details: str
    """JSON with what its kind of task needs besides; see tasks.data.fields.Example."""


@dataclass(frozen=True)
class Question:
    """`prompt`: the user turn; `gold`: the right answer; `details`: JSON on how it was asked, "" for nothing."""

    id: str
    prompt: str
    gold: str
    tier: str
    details: str = ""


def ask(kind: JudgedKind, problem: Problem, seed: int, suffix: str) -> Question:
    """The question that a problem becomes under a seed.

    Raises:
        StageError: the problem lacks what its kind needs.
    """
    return _ASK[kind](problem, seed, suffix)


def permutation(num: int, seed: int, problem_id: str) -> list[int]:
    """An order of range(num) that follows from seed and problem alone."""
    return sorted(range(num), key=lambda i: hashlib.sha256(f"{seed}/{problem_id}/{i}".encode()).digest())


def _free_form(problem: Problem, seed: int, suffix: str) -> Question:
    return Question(problem.id, problem.prompt + suffix, problem.answer, problem.tier)


def _multiple_choice(problem: Problem, seed: int, suffix: str) -> Question:
    """details: {"order": [...]}, for each letter the place of its option in the data, where the right one is first.

    Departure: all options are permuted, as in simple-evals; the harness that the paper builds on moves the right one.
    """
    choices = json.loads(problem.details or "{}").get("choices", [])
    if len(choices) != len(LETTERS):
        raise StageError(
            f"problem {problem.id!r} has {len(choices)} choices and needs {len(LETTERS)}: set kind=math, or give data "
            "whose details column holds them"
        )
    order = permutation(len(choices), seed, problem.id)
    shown = dict(zip(LETTERS, (choices[i] for i in order), strict=True))
    prompt = CHOICE_PROMPT.format(question=problem.prompt, **shown) + suffix
    return Question(problem.id, prompt, LETTERS[order.index(0)], problem.tier, json.dumps({"order": order}))


_ASK: dict[JudgedKind, Callable[[Problem, int, str], Question]] = {
    "math": _free_form,
    "choice": _multiple_choice,
    "code": _free_form,
}


def truth(kind: JudgedKind, problem: Problem, question: Question) -> str:
    """What the judge of this kind compares a response to the question with.

    Raises:
        StageError: a programming problem's tests cannot be run.
    """
    return TRUTHS[kind](problem, question)


def checked_tests(problem: Problem) -> str:
    """A programming problem's tests, as JSON.  StageError unless they can be run."""
    from tasks.judging.code_tests import parse_tests  # with the driver of programs, which other kinds have none of

    try:
        parse_tests(problem.details)
    except ValueError as error:
        raise StageError(
            f"problem {problem.id!r} has no tests that can be run: {error}; set another kind, or give a data set whose "
            "details column holds them"
        ) from error
    return problem.details


def _gold(problem: Problem, question: Question) -> str:
    return question.gold


def _tests(problem: Problem, question: Question) -> str:
    return checked_tests(problem)


TRUTHS: dict[JudgedKind, Callable[[Problem, Question], str]] = {"math": _gold, "choice": _gold, "code": _tests}
