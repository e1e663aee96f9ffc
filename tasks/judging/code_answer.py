"""The verifier of programs that training rewards and evaluation share: fenced code in, verdict out.

Each test is a process of its own in the sandbox. The expected outputs never enter it: whatever a program does there,
to itself or to Python, it passes a test only by saying what it was not told.
"""

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Literal

from tasks.judging.code_tests import CodeTest, parse_tests
from tasks.judging.sandbox import Limits, Sandbox

# Possessive, so that each line is read once.
_FENCE = re.compile(r"^[ \t]*+`{3,}+[ \t]*+([^`\s]*+)[^`\n]*+$", re.MULTILINE)
_PYTHON = {"python", "python3", "py"}

ErrorKind = Literal["no_code", "wrong_answer", "failed", "timeout", "slept", "output_limit"]


@dataclass(frozen=True)
class CodeVerdict:
    """Grading stops at the first test that is not passed; `error_kind` says what happened there.

    `sandboxed` is False where the program ran with the caller's rights.
    """

    correct: bool
    extracted: str | None
    num_passed: int
    num_tests: int
    error_kind: ErrorKind | None
    sandboxed: bool

    @property
    def timed_out(self) -> bool:
        """Whether a test ran out of processor time, or slept too long."""
        return self.error_kind in ("timeout", "slept")


def last_program(answer_text: str) -> str | None:
    """The last complete block of code in a response without its reasoning. Linear in the text's length.

    A block that says it is Python goes before one that does not say what it is; other languages and a block that is
    never closed are passed over.
    """
    blocks = _blocks(answer_text)
    tagged = [code for language, code in blocks if language.lower() in _PYTHON]
    candidates = tagged or [code for language, code in blocks if not language]
    return candidates[-1] if candidates else None


def published_program(text: str) -> str | None:
    """What LiveCodeBench runs: the lines between the last two that hold a fence, anywhere in the response.

    LiveCodeBench (lcb_runner/utils/extraction_utils.py) and lighteval (tasks/tasks/lcb/codegen_metrics.py) take it so;
    without two such lines there is no program.
    """
    lines = text.split("\n")
    fences = [index for index, line in enumerate(lines) if "```" in line]
    return "\n".join(lines[fences[-2] + 1 : fences[-1]]) if len(fences) >= 2 else None


def _blocks(text: str) -> list[tuple[str, str]]:
    """(language, code) of each complete block; a fence that names a language opens, also inside an unclosed block."""
    blocks: list[tuple[str, str]] = []
    opening: re.Match[str] | None = None
    for fence in _FENCE.finditer(text):
        if opening is None or fence.group(1):
            opening = fence
        else:
            blocks.append((opening.group(1), text[opening.end() + 1 : fence.start()].removesuffix("\n")))
            opening = None
    return blocks


class CodeGrader(AbstractContextManager["CodeGrader"]):
    """Grades programs by running them against tests; use as a context manager. Safe to use from any thread.

    Args:
        num_workers: programs that run at the same time.
        limits: of each test's run.
        unsafe: where no sandbox works, without one, with the caller's rights; marked in each verdict.

    Raises:
        ValueError: there is no sandbox on this machine; the message names the remedy.
    """

    def __init__(self, num_workers: int = 2, limits: Limits | None = None, unsafe: bool = False) -> None:
        self._sandbox = Sandbox(limits, unsafe)
        self._threads = ThreadPoolExecutor(num_workers, thread_name_prefix="code-grader")

    def __exit__(self, *_: object) -> None:
        self.close()

    def grade_programs(self, programs: Sequence[str | None], tests: Sequence[str]) -> list[CodeVerdict]:
        """A verdict for each program (None: there is none) against the tests (JSON) beside it; equal ones run once.

        Raises:
            ValueError: tests that cannot be read (tasks/judging/code_tests.py); nothing has run then.
            RuntimeError: the sandbox did not start.
        """
        pairs = list(zip(programs, tests, strict=True))
        parsed = {text: parse_tests(text) for text in set(tests)}
        running = {
            (program, text): self._threads.submit(self._grade, program, parsed[text]) for program, text in set(pairs)
        }
        try:
            return [running[pair].result() for pair in pairs]
        finally:
            for future in running.values():
                future.cancel()

    def close(self) -> None:
        """Wait for the programs that run, start no other."""
        self._threads.shutdown(cancel_futures=True)

    def _grade(self, program: str | None, tests: Sequence[CodeTest]) -> CodeVerdict:
        verdict = partial(CodeVerdict, extracted=program, num_tests=len(tests), sandboxed=self._sandbox.isolated)
        if program is None or not program.strip():
            return verdict(correct=False, num_passed=0, error_kind="no_code")
        for num_passed, test in enumerate(tests):
            if error := self._error(program, test):
                return verdict(correct=False, num_passed=num_passed, error_kind=error)
        return verdict(correct=True, num_passed=len(tests), error_kind=None)

    def _error(self, program: str, test: CodeTest) -> ErrorKind | None:
        run = self._sandbox.run(program, test.stdin, test.max_output_bytes, test.fn_name)
        if run.end != "exited":
            return "failed" if run.end == "killed" else run.end
        return None if test.passed_by(run.output) else "wrong_answer"
