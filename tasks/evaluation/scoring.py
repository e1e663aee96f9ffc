"""The two scores of a response, for each kind of task.

Strict: the judge's verdict, which is also the reward in training (tasks/judging/judge.py).
Paper: as the harness that the paper builds on scores, over the whole response, reasoning included, cut off or not.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tasks.data.benchmarks import TaskKind
from tasks.evaluation.config import EvaluateConfig
from tasks.evaluation.lighteval_compat import extracted_letter
from tasks.judging.judge import judge_choices, judge_code, judge_math, num_workers, open_code_grader
from tasks.judging.math_answer import Grader, Verdict
from tasks.judging.questions import Problem, checked_tests
from tasks.judging.response import Response

if TYPE_CHECKING:
    from tasks.judging.code_answer import CodeGrader, CodeVerdict


@dataclass(frozen=True)
class Scores:
    """`details`: JSON on what the strict scorer saw besides, "" for nothing."""

    strict: Verdict | CodeVerdict
    paper: Verdict | CodeVerdict
    details: str = ""


Score = Callable[[Sequence[Response], Sequence[str]], list[Scores]]
"""(responses, gold answers) -> scores."""


def open_scorer(config: EvaluateConfig, problems: Sequence[Problem]) -> AbstractContextManager[Score]:
    """The scorer of a kind of task, with the worker processes it needs.

    Raises:
        StageError: tests of programs that cannot be read, or no sandbox to run programs in.
    """
    return SCORERS[config.kind](config, problems)


@contextmanager
def _open_math_scorer(config: EvaluateConfig, problems: Sequence[Problem]) -> Iterator[Score]:
    with Grader(num_workers()) as grader:
        yield lambda responses, golds: score_math(grader, responses, golds)


@contextmanager
def _open_choice_scorer(config: EvaluateConfig, problems: Sequence[Problem]) -> Iterator[Score]:
    yield score_choices


@contextmanager
def _open_code_scorer(config: EvaluateConfig, problems: Sequence[Problem]) -> Iterator[Score]:
    tests = {problem.answer: checked_tests(problem) for problem in problems}  # the answer names them
    with open_code_grader(config.unsafe_code) as grader:
        yield lambda responses, golds: score_code(grader, responses, [tests[gold] for gold in golds])


@contextmanager
def _open_option_scorer(config: EvaluateConfig, problems: Sequence[Problem]) -> Iterator[Score]:
    yield score_options


SCORERS: dict[TaskKind, Callable[[EvaluateConfig, Sequence[Problem]], AbstractContextManager[Score]]] = {
    "math": _open_math_scorer,
    "choice": _open_choice_scorer,
    "code": _open_code_scorer,
    "loglikelihood": _open_option_scorer,
}


def score_math(grader: Grader, responses: Sequence[Response], golds: Sequence[str]) -> list[Scores]:
    """The paper's way is what math-verify finds in the whole response."""
    paper = grader.grade_published([response.text for response in responses], golds)
    return [Scores(*verdicts) for verdicts in zip(judge_math(grader, responses, golds), paper, strict=True)]


def score_choices(responses: Sequence[Response], golds: Sequence[str]) -> list[Scores]:
    """The paper's way is lighteval's extraction."""
    letters = [extracted_letter(response.text) for response in responses]
    paper = [Verdict(letter == gold, letter, timed_out=False) for letter, gold in zip(letters, golds, strict=True)]
    return [Scores(*verdicts) for verdicts in zip(judge_choices(responses, golds), paper, strict=True)]


def score_options(responses: Sequence[Response], golds: Sequence[str]) -> list[Scores]:
    """Verdicts on the option that was taken for its probability; there is one way to read it."""
    verdicts = [
        Verdict(response.text == gold, response.text, timed_out=False)
        for response, gold in zip(responses, golds, strict=True)
    ]
    return [Scores(verdict, verdict) for verdict in verdicts]


def score_code(grader: CodeGrader, responses: Sequence[Response], tests: Sequence[str]) -> list[Scores]:
    """The paper's way is the program that LiveCodeBench takes from the whole response; mostly it is the same one."""
    from tasks.judging.code_answer import published_program

    strict = judge_code(grader, responses, tests)
    published = [published_program(response.text) for response in responses]
    differing = [i for i, verdict in enumerate(strict) if published[i] != verdict.extracted]
    paper = list(strict)
    others = grader.grade_programs([published[i] for i in differing], [tests[i] for i in differing])
    for i, verdict in zip(differing, others, strict=True):
        paper[i] = verdict
    return [Scores(verdict, other, _code_details(verdict)) for verdict, other in zip(strict, paper, strict=True)]


def _code_details(verdict: CodeVerdict) -> str:
    names = ("num_passed", "num_tests", "error_kind", "sandboxed")
    return json.dumps({name: getattr(verdict, name) for name in names})
