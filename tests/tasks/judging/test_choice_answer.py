"""Which letter an answer chooses."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.judging.choice_answer import chosen_letter, grade_choice
from tasks.judging.math_answer import Verdict


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("Answer: C", "C"),
        ("so it is not B.\n\nAnswer: $D$", "D"),
        ("**Answer:** A", "A"),
        ("**Answer: B**", "B"),
        ("answer: (C)", "C"),
        ("Answer: $\\boxed{B}$", "B"),
        ("Answer: \\text{A}", "A"),
        ("Answer: A\nno, wait\nAnswer: B", "B"),
        ("\\boxed{D}", "D"),
        ("Answer: A \\boxed{B}", "B"),
        ("\\boxed{\\text{C}}", "C"),
        ("\\boxed{(A) 10^{-4}}", "A"),
        ("\\boxed{B) 3 m}", "B"),
        ("\\boxed{10^{-4}}\nAnswer: A", "A"),
        ("Answer: E", None),
        ("Answer: a wave", None),
        ("Answer: Dogs bark", None),
        ("the correct one is C", None),
        ("A", None),
        ("", None),
        ("\\boxed{Apple}", None),
    ],
)
def test_chosen_letter(text: str, letter: str | None) -> None:
    assert chosen_letter(text) == letter


def test_a_response_without_end_is_wrong() -> None:
    assert grade_choice(None, "A") == Verdict(False, None, False)
    assert grade_choice("Answer: A", "A") == Verdict(True, "A", False)
    assert grade_choice("Answer: A", "B") == Verdict(False, "A", False)


@given(st.text(alphabet="answer: ABCD*$(){}\\boxedtext\n\0\u2212"))
def test_no_text_crashes(text: str) -> None:
    assert chosen_letter(text) in ("A", "B", "C", "D", None)


@pytest.mark.parametrize("unit", ["answer:", "answer: ", "\\boxed{", "answer" + " " * 20, "\\boxed{A", "$("])
def test_linear_in_the_length(unit: str) -> None:
    text = unit * (1_000_000 // len(unit))
    start = time.process_time()
    chosen_letter(text)
    assert time.process_time() - start < 5
