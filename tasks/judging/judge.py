"""The two scorers of a response, for each kind of task.

Strict: the answer after the last </think>, boxed first, else stated as the answer; wrong if the response was cut off.
Paper: as the harness that the paper builds on scores, over the whole response, reasoning included, cut off or not.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from tasks.evaluation.config import EvaluateConfig
from tasks.evaluation.lighteval_compat import extracted_letter
from tasks.evaluation.problems import Problem
from tasks.judging.choice_answer import grade_choice
from tasks.judging.code_answer import CodeGrader, CodeVerdict, last_program, published_program
from tasks.judging.code_tests import parse_tests
from tasks.judging.math_answer import Grader, Verdict, answer_part
from tasks.runtime.stage import StageError

MOST_WORKERS = 8
"""A degenerate response, such as one number 10,000 times, may take math-verify its whole limit of processor time."""


@dataclass(frozen=True)
class Response:
    """`reasoning_opened`: the prompt ends inside the reasoning, as that of DeepSeek-R1's template does."""

    text: str
    truncated: bool
    reasoning_opened: bool

    @property
    def answer_part(self) -> str | None:
        """The text that the strict scorer reads; None where there is none."""
        return None if self.truncated else answer_part(self.text, self.reasoning_opened)


@dataclass(frozen=True)
class Scores:
    """`details`: JSON on what the strict scorer saw besides, "" for nothing."""

    strict: Verdict | CodeVerdict
    paper: Verdict | CodeVerdict
    details: str = ""


Score = Callable[[Sequence[Response], Sequence[str]], list[Scores]]
"""(responses, gold answers) -> scores."""


@contextmanager
def open_scorer(config: EvaluateConfig, problems: Sequence[Problem]) -> Iterator[Score]:
    """The scorer of a kind of task, with the worker processes it needs.

    Raises:
        StageError: tests of programs that cannot be read, or no sandbox to run programs in.
    """
    num_workers = min(MOST_WORKERS, max(2, os.cpu_count() or 2))
    if config.kind == "choice":
        yield score_choices
    elif config.kind == "loglikelihood":
        yield score_options
    elif config.kind == "code":
        tests = _checked_tests(problems)
        with _code_grader(num_workers, config.unsafe_code) as code_grader:
            yield lambda responses, golds: score_code(code_grader, responses, [tests[gold] for gold in golds])
    else:
        with Grader(num_workers=num_workers) as grader:
            yield lambda responses, golds: score_math(grader, responses, golds)


def _checked_tests(problems: Sequence[Problem]) -> dict[str, str]:
    """Each problem's tests (JSON) by its answer, which names them."""
    for problem in problems:
        try:
            parse_tests(problem.details)
        except ValueError as error:
            raise StageError(
                f"problem {problem.id!r} has no tests that can be run: {error}; evaluate it as another kind, or give a "
                "data set whose details column holds them"
            ) from error
    return {problem.answer: problem.details for problem in problems}


def _code_grader(num_workers: int, unsafe: bool) -> CodeGrader:
    try:
        return CodeGrader(num_workers, unsafe=unsafe)
    except ValueError as error:
        raise StageError(f"{error} In an evaluation that is evaluate.unsafe_code=true.") from error


def score_math(grader: Grader, responses: Sequence[Response], golds: Sequence[str]) -> list[Scores]:
    """Verdicts of math-verify on the answer part, and on what it finds in the whole response."""
    strict = grader.grade_parts([response.answer_part for response in responses], golds)
    paper = grader.grade_published([response.text for response in responses], golds)
    return [Scores(*verdicts) for verdicts in zip(strict, paper, strict=True)]


def score_choices(responses: Sequence[Response], golds: Sequence[str]) -> list[Scores]:
    """Verdicts on the letter chosen, strictly and by lighteval's extraction."""
    return [_score_choice(response, gold) for response, gold in zip(responses, golds, strict=True)]


def _score_choice(response: Response, gold: str) -> Scores:
    letter = extracted_letter(response.text)
    return Scores(grade_choice(response.answer_part, gold), Verdict(letter == gold, letter, timed_out=False))


def score_options(responses: Sequence[Response], golds: Sequence[str]) -> list[Scores]:
    """Verdicts on the option that was taken for its probability; there is one way to read it."""
    verdicts = [
        Verdict(response.text == gold, response.text, timed_out=False)
        for response, gold in zip(responses, golds, strict=True)
    ]
    return [Scores(verdict, verdict) for verdict in verdicts]


def score_code(grader: CodeGrader, responses: Sequence[Response], tests: Sequence[str]) -> list[Scores]:
    """Verdicts on the last program of the answer part, and on the one that LiveCodeBench takes from all of it."""
    parts = [response.answer_part for response in responses]
    strict = [None if part is None else last_program(part) for part in parts]
    published = [published_program(response.text) for response in responses]
    verdicts = grader.grade_programs([*strict, *published], [*tests, *tests])
    return [
        Scores(verdict, paper, _code_details(verdict))
        for verdict, paper in zip(verdicts[: len(tests)], verdicts[len(tests) :], strict=True)
    ]


def _code_details(verdict: CodeVerdict) -> str:
    names = ("num_passed", "num_tests", "error_kind", "sandboxed")
    return json.dumps({name: getattr(verdict, name) for name in names})
