"""The judge of responses, for each kind of task: its verdict is the reward in training and the score in evaluation.

It reads the answer after the last </think>, boxed first, else stated as the answer; what was cut off is wrong.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, TypeAlias

from tasks.judging.choice_answer import grade_choice
from tasks.judging.math_answer import Grader, Verdict
from tasks.judging.response import JudgedKind, Response
from tasks.runtime.stage import StageError

if TYPE_CHECKING:
    # The sandbox is imported where programs are judged, so that it is no part of the code of what judges none.
    from tasks.judging.code_answer import CodeGrader, CodeVerdict

MOST_WORKERS = 8
"""A degenerate response, such as one number 10,000 times, may take math-verify its whole limit of processor time."""

Judge: TypeAlias = "Callable[[Sequence[Response], Sequence[str]], Sequence[Verdict | CodeVerdict]]"
"""(responses, truths) -> verdicts.  A truth is the reference answer, the right letter, or a program's tests as JSON."""


def open_judge(kind: JudgedKind, unsafe_code: bool = False) -> AbstractContextManager[Judge]:
    """The judge of a kind of task, with the worker processes it needs.

    Raises:
        StageError: there is no sandbox to run programs in.
    """
    return JUDGES[kind](unsafe_code)


@contextmanager
def _open_math_judge(unsafe_code: bool) -> Iterator[Judge]:
    with Grader(num_workers()) as grader:
        yield lambda responses, answers: judge_math(grader, responses, answers)


@contextmanager
def _open_choice_judge(unsafe_code: bool) -> Iterator[Judge]:
    yield judge_choices


@contextmanager
def _open_code_judge(unsafe_code: bool) -> Iterator[Judge]:
    with open_code_grader(unsafe_code) as grader:
        yield lambda responses, tests: judge_code(grader, responses, tests)


JUDGES: dict[JudgedKind, Callable[[bool], AbstractContextManager[Judge]]] = {
    "math": _open_math_judge,
    "choice": _open_choice_judge,
    "code": _open_code_judge,
}


def num_workers() -> int:
    return min(MOST_WORKERS, max(2, os.cpu_count() or 2))


def check_judge(kind: str, unsafe_code: bool) -> None:
    """StageError where responses of this kind cannot be judged here: programs take a sandbox."""
    if kind == "code":
        from tasks.judging.sandbox import Sandbox

        with _explained():
            Sandbox(unsafe=unsafe_code)


def open_code_grader(unsafe_code: bool) -> CodeGrader:
    """StageError where there is no sandbox, unless programs are to run without."""
    from tasks.judging.code_answer import CodeGrader

    with _explained():
        return CodeGrader(num_workers(), unsafe=unsafe_code)


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise StageError(str(error)) from error


def judge_math(grader: Grader, responses: Sequence[Response], answers: Sequence[str]) -> list[Verdict]:
    """Verdicts on what each answer says."""
    return grader.grade_parts([response.answer_part for response in responses], answers)


def judge_code(grader: CodeGrader, responses: Sequence[Response], tests: Sequence[str]) -> list[CodeVerdict]:
    """Verdicts on the last program of each answer."""
    from tasks.judging.code_answer import last_program

    parts = [response.answer_part for response in responses]
    return grader.grade_programs([None if part is None else last_program(part) for part in parts], tests)


def judge_choices(responses: Sequence[Response], letters: Sequence[str]) -> list[Verdict]:
    """Verdicts on the letter chosen."""
    return [grade_choice(response.answer_part, letter) for response, letter in zip(responses, letters, strict=True)]
