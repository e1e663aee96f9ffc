"""Tests of a programming problem, and what counts as passing one: LiveCodeBench's rules, applied outside the sandbox.

They come as JSON, a list of {"input": str, "output": str, "type": "stdin" | "functional", "fn_name": str}:

- stdin: the program reads `input` on standard input and must print `output`;
- functional: `fn_name`, a method of class Solution or a function, is called with the JSON values in the lines of
  `input` and must return the JSON value in `output`.
"""

import json
from decimal import Decimal
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, TypeAdapter, model_validator

from tasks.judging.code_driver import MOST_DIGITS

# How much longer than the expected output an output may be before it is hopeless: other white space, longer decimals.
_SPARE_FACTOR, _SPARE_BYTES = 4, 65_536
# Below the least limit that Python can be set to.
_DIGITS_AT_ONCE = 640


class CodeTest(BaseModel):
    """One test; `fn_name` is there for functional tests only."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    input: str
    output: str
    type: Literal["stdin", "functional"]
    fn_name: str = ""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.type == "functional":
            if not self.fn_name.isidentifier():
                raise ValueError(f"a functional test needs the name of a function in fn_name, not {self.fn_name!r}")
            try:
                for line in (self.output, *self._argument_lines):
                    _value(line)
            except ValueError as error:
                raise ValueError(f"a functional test's output and lines of input must be JSON: {error}") from None
        elif self.fn_name:
            raise ValueError(f"a stdin test calls no function, but fn_name is {self.fn_name!r}")
        return self

    @property
    def stdin(self) -> str:
        """What the program is given: the input as it is, or the arguments of the function as a JSON list."""
        if self.type == "stdin":
            return self.input
        return f"[{', '.join(self._argument_lines)}]"

    @property
    def _argument_lines(self) -> list[str]:
        return [line for line in self.input.split("\n") if line.strip()]

    @property
    def max_output_bytes(self) -> int:
        """An output longer than this cannot be right, and is not read."""
        return _SPARE_FACTOR * len(self.output.encode()) + _SPARE_BYTES

    def passed_by(self, output: bytes) -> bool:
        """Whether this output, from stdout or a function's result as JSON, is the expected one."""
        text = output.decode(errors="replace")
        return same_value(text, self.output) if self.type == "functional" else same_lines(text, self.output)


_TESTS = TypeAdapter(tuple[CodeTest, ...])


def parse_tests(text: str) -> tuple[CodeTest, ...]:
    """The tests of one problem.

    Raises:
        ValueError: they are not of the form above, or there are none, which every program would pass.
    """
    tests = _TESTS.validate_json(text)
    if not tests:
        raise ValueError("a programming problem without tests cannot be graded: leave it out of the data")
    return tests


def same_lines(output: str, expected: str) -> bool:
    """Equal line by line, as strings or as lists of exact decimal numbers (1.0 is 1); outer white space is nothing.

    LiveCodeBench has no tolerance (lcb_runner/evaluation/testing_util.py, grade_stdio).
    """
    lines, expected_lines = _lines(output), _lines(expected)
    return len(lines) == len(expected_lines) and all(map(_same_line, lines, expected_lines))


def same_value(output: str, expected: str) -> bool:
    """Equal as JSON values in Python's sense (1 is 1.0, and True), so that tuples are lists; grade_call_based."""
    try:
        return bool(_value(output) == _value(expected))
    except (ValueError, RecursionError):
        return False  # no result, two results, or a monster


def _value(text: str) -> Any:
    return json.loads(text, parse_int=_integer)


def _integer(digits: str) -> int:
    """An integer of as many digits as programs may print, whatever Python's own limit in this process."""
    if len(digits) > MOST_DIGITS + 1:
        raise ValueError(f"an integer of more than {MOST_DIGITS} digits")
    if len(digits) <= _DIGITS_AT_ONCE:
        return int(digits)
    if digits.startswith("-"):
        return -_integer(digits[1:])
    half = len(digits) // 2
    return _integer(digits[:-half]) * 10**half + _integer(digits[-half:])


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.strip().split("\n")]


def _same_line(line: str, expected: str) -> bool:
    if line == expected:
        return True
    words, expected_words = line.split(), expected.split()
    try:
        return len(words) == len(expected_words) and all(
            Decimal(word) == Decimal(expected_word) for word, expected_word in zip(words, expected_words, strict=True)
        )
    except ArithmeticError:
        return False  # no numbers
