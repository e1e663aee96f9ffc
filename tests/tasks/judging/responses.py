"""Whole responses to a prompt that opens the reasoning, judged as training and evaluation do."""

from __future__ import annotations

from collections.abc import Sequence

from tasks.judging.code_answer import CodeGrader, CodeVerdict
from tasks.judging.judge import judge_code, judge_math
from tasks.judging.math_answer import Grader, Verdict
from tasks.judging.response import Response


def grade_math(grader: Grader, texts: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
    return judge_math(grader, _responses(texts), answers)


def grade_code(grader: CodeGrader, texts: Sequence[str], tests: Sequence[str]) -> list[CodeVerdict]:
    return judge_code(grader, _responses(texts), tests)


def _responses(texts: Sequence[str]) -> list[Response]:
    return [Response(text, truncated=False, reasoning_opened=True) for text in texts]
