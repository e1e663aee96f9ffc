"""Extraction and the decisions that need no algebra."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.data.boxes import last_boxed
from tasks.judging.math_answer import (
    MAX_ANSWER_CHARS,
    answer_part,
    has_nested_power,
    quick_published_verdict,
    quick_verdict,
)


def final_answer(text: str) -> str | None:
    part = answer_part(text)
    return None if part is None else last_boxed(part)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("so</think>\n\\boxed{42}", "42"),
        ("\\boxed{1}</think> \\boxed{2} and \\boxed{ 3 }.", "3"),
        ("a</think>\\boxed{1}</think>none", None),
        ("no closing tag \\boxed{42}", None),
        ("</think>no box 42", None),
        ("</think>\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("</think>\\boxed{\\left\\{ x \\right.}", "\\left\\{ x \\right."),
        ("</think>\\boxed{1} then cut off \\boxed{2", "1"),
        ("</think>\\boxed{\\boxed{5}}", "5"),
        ("</think>} } \\boxed {7} {", "7"),
        ("</think>\\\\boxed{8}", "8"),
        ("</think>\\boxed{}", ""),
        ("</think>\\boxed{a\0\u2212b}", "a\0\u2212b"),
        ("", None),
    ],
)
def test_final_answer(text: str, expected: str | None) -> None:
    assert final_answer(text) == expected


@pytest.mark.parametrize(
    ("text", "opened", "part"),
    [
        ("a</think>b</think>c", True, "c"),
        ("a</think>b", False, "b"),
        ("cut off", True, None),
        ("plain answer", False, "plain answer"),
        ("<think>cut off", False, None),
        ("", False, ""),
        ("", True, None),
    ],
)
def test_answer_part(text: str, opened: bool, part: str | None) -> None:
    assert answer_part(text, opened) == part


@pytest.mark.parametrize(
    ("gold", "response", "verdict"),
    [
        ("5", "<think>7</think>\\boxed{5}", True),
        ("5", "cut off, \\boxed{5}", True),
        ("-5", "$x = \\boxed{-5}$.", True),
        ("5", "\\boxed{6} I hope so: I hope 5", None),
        ("5", "\\boxed{6}", False),
        ("5", "\\boxed{4} or \\boxed{5}", None),
        ("5", "\\boxed{4} or \\fbox{5}", None),
        ("5", "\\boxed{5} percent", None),
        ("5", "\\boxed{5\\%}", None),
        ("5", "\\boxed{5.0}", None),
        ("5.0", "\\boxed{5}", None),
        ("5", "the answer is 5", None),
    ],
)
def test_quick_published_verdict(gold: str, response: str, verdict: bool | None) -> None:
    assert quick_published_verdict(gold, response) is verdict


@pytest.mark.parametrize(
    "unit", ["\\boxed{", "\\", "{", "}", "\\boxed ", "\\boxed{}", "</think>", "\\boxed{" + " " * 50]
)
def test_final_answer_is_linear_in_the_length(unit: str) -> None:
    text = "</think>" + unit * (1_000_000 // len(unit))
    start = time.process_time()
    final_answer(text)
    assert time.process_time() - start < 5


@given(st.text())
def test_final_answer_finds_any_balanced_content(content: str) -> None:
    content = content.replace("{", "").replace("}", "").replace("\\", "").replace("</think>", "")
    assert final_answer(f"x</think>\\boxed{{{content}}}") == content.strip()


@given(st.text(alphabet="\\boxed{}^()*/.,0159 %$\0\u2212x<think>"), st.text(alphabet="\\frac{}^()*/.,0159%"))
def test_no_input_crashes_the_quick_path(answer: str, gold: str) -> None:
    final_answer("</think>" + answer)
    assert quick_verdict(gold, answer) in (True, False, None)


@pytest.mark.parametrize(
    ("gold", "answer", "verdict"),
    [
        ("42", "42", True),
        ("42", "42.", True),
        ("42", "43", False),
        ("0.1", "\\dfrac{1}{10}", True),
        ("1/3", "0.333333", False),
        ("9007199254740993", "9007199254740992", False),
        ("\\$1,234", "1234.0", True),
        ("90^\\circ", "90", True),
        ("25", "25\\%", True),
        ("0.25", "25\\%", True),
        ("\\text{C}", "C", True),
        ("\\left( 1, 2 \\right)", "(1,2)", True),
        ("-5", "\u22125", True),
        ("x+1", "1+x", None),
        ("5", "5^(5^(5^(5^5)))", False),
        ("2^{2^{3}}", "2^{2^{1+2}}", None),
        ("5", "", False),
        ("", "", False),
        ("", "%", False),
        ("7" * (MAX_ANSWER_CHARS + 1), "7" * (MAX_ANSWER_CHARS + 1), False),
        ("x^2", "x\u00b2", None),
    ],
)
def test_quick_verdict(gold: str, answer: str, verdict: bool | None) -> None:
    assert quick_verdict(gold, answer) is verdict


@pytest.mark.parametrize(
    ("answer", "nested"),
    [
        ("5^(5^5)", True),
        ("5^{5^{5}}", True),
        ("5^5^5", True),
        ("5**10**10", True),
        ("5^{2}^3", True),
        ("2^{x+y^2}", True),
        ("x^2y^3", False),
        ("x^{10}y^3", False),
        ("x^2+y^2", False),
        ("(x^2)^3", False),
        ("e^{2}", False),
        ("^", False),
    ],
)
def test_has_nested_power(answer: str, nested: bool) -> None:
    assert has_nested_power(answer) is nested
