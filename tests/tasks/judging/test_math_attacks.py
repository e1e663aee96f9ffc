r"""Attacks on the math verifier, as hostile model output would make them: none is graded correct, none holds it up, and
the next good answer is still found right.

An attack that takes a worker's life takes seconds, its successor's start included: most of these are slow tests, and so
are those that reach a worker only in the paper's way of scoring.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tasks.judging.math_answer import Grader, Verdict
from tests.tasks.judging.responses import grade_math

# Of one comparison; the wall time includes the start of a new worker on a busy machine.
CPU_SECONDS = 1.0
MOST_SECONDS = 30.0

# (reference answer, box's content): math-verify does not come to an end, so that a worker is killed
ENDLESS = {
    "power": ("5", "9^{999999999}"),
    "factorial": ("5", "99999999!"),
    "sum": ("5", "\\sum_{k=1}^{99999999} \\frac{1}{k^2}"),
}
# Endless or nearly so.
LONG = {
    "long set": ("5", "\\{" + "1,2," * 200 + "3\\}"),
    "intervals": ("(1,2)", "(1,2)\\cup" * 90 + "(3,4)"),
    "power of a power": ("5", "((9^{99999})^{99999})^{99999}"),
    "negative power": ("5", "9^{-999999999}"),
    "factorial of factorials": ("5", "((9!)!)!"),
    "binomial": ("5", "\\binom{99999999}{49999999}"),
    "product": ("5", "\\prod_{k=1}^{9999999} k^k"),
    "integral": ("5", "\\int_0^1 \\int_0^x \\sin(\\cos(x^y^x)) e^{x^{x}} dy dx"),
    "limit": ("5", "\\lim_{x \\to 0} \\frac{\\sin(\\tan x) - \\tan(\\sin x)}{x^{77}}"),
    "derivative": ("5", "\\frac{d^{99}}{dx^{99}} \\tan(\\sin(x^{99}))"),
    "expansion": ("5", "(a+b+c+d+e+f+g+h)^{99}"),
    "modulus": ("5", "7^{77777777777} \\mod 3^{99999}"),
    "long set of sets": ("\\{1,2\\}", "\\{" + "\\{1\\}," * 150 + "2\\}"),
}

# (reference answer, box's content): decided within the limits
BOXES = {
    "power tower": ("5", "5^(5^(5^(5^5)))"),
    "power tower in braces": ("5", "9^{9^{9^{9^{9}}}}"),
    "power tower by roots": ("5", "\\sqrt{9^{9^{9^9}}}"),
    "scientific notation": ("5", "1e999999999"),
    "endless sum": ("5", "\\sum_{k=1}^{\\infty} \\sum_{n=1}^{\\infty} \\frac{\\sin(k n)}{k^n}"),
    "polynomial": ("x", "(x+1)^{9999} - x^{9999}"),
    "matrix": ("5", "\\begin{pmatrix}" + "1&" * 200 + "1\\end{pmatrix}"),
    "matrix power": ("5", "\\begin{pmatrix}2&1\\\\1&2\\end{pmatrix}^{99999999}"),
    "determinant": ("5", "\\det\\begin{pmatrix}a&b&c\\\\d&e&f\\\\g&h&i\\end{pmatrix}^{999}"),
    "nested fractions": ("5", "\\frac{1}{" * 60 + "2" + "}" * 60),
    "nested roots": ("5", "\\sqrt{2+" * 60 + "2" + "}" * 60),
    "nested brackets": ("5", "(" * 400 + "6" + ")" * 400),
    "unbalanced braces": ("5", "{{{{}}}{{}" * 50),
    "many digits": ("5", "7" * 1_000_000),
    "many decimals": ("0.5", "0." + "5" * 999),
    "long sum": ("5", "1+" * 499 + "1"),
    "equations": ("5", "x=" * 300 + "y"),
    "inequalities": ("5", "x<" * 300 + "y"),
    "backtracking": ("5", "1," * 490 + "x"),
    "backtracking in text": ("5", "\\text{" * 60 + " " * 500 + "}" * 60),
    "percentages": ("5", "%\\%" * 300),
    "other digits": ("5", "\u0666"),
    "superscript": ("25", "5\u00b2"),
    "full width": ("5", "\uff16"),
    "zero width": ("5", "\u200b6\u200b"),
    "right to left": ("12", "\u202e12\u202c3"),
    "NUL": ("5", "\0" * 999),
    "lone surrogates": ("5", "\ud800\udfff" * 100),
    "any of the answers": ("5", "1 \\text{ or } 2 \\text{ or } 3 \\text{ or } 4"),
    "infinity": ("5", "\\infty - \\infty"),
    "division by zero": ("5", "\\frac{0}{0}"),
    "not a number": ("5", "nan"),
    "Python": ("5", "__import__('os').system('touch /tmp/reached')"),
    "sympy": ("5", "Integer(10)**Integer(10)**Integer(10)"),
    "a verdict": ("5", 'true}\n[true, "5"]\n{'),
    "nothing": ("5", ""),
    "white space": ("5", " \t\n~\\,"),
}

# (reference answer, whole response): graded as the paper's harness does, too
RESPONSES = {
    "only while thinking": ("5", "\\boxed{5} thinks on and is cut off"),
    "then another": ("5", "x</think>\\boxed{5} or rather \\boxed{6}"),
    "a box in a box": ("5", "x</think>\\boxed{5 \\boxed{6}}"),
    "an open box": ("5", "x</think>\\boxed{5"),
    "thinking again": ("5", "x</think>\\boxed{5}</think>so \\boxed{6}"),
    "many thoughts": ("5", "</think>" * 10_000),
    "many boxes": ("5", "</think>" + "\\boxed{6}" * 10_000),
    "many open boxes": ("5", "</think>" + "\\boxed{" * 10_000),
    "many dollars": ("5", "</think>" + "$" * 20_000),
    "many formulas": ("5", "</think>" + "$x+1$ " * 3_000),
    "many announcements": ("5", "</think>" + "the final answer is " * 3_000),
    "many numbers": ("5", "</think>" + "1,234,567.89 " * 3_000),
}


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader(num_workers=1, cpu_seconds=CPU_SECONDS) as opened:
        assert grade_math(opened, [respond("1+x")], ["x+1"])[0].correct  # it has started
        yield opened


def respond(answer: str) -> str:
    return f"thoughts</think>The answer is \\boxed{{{answer}}}."


@contextmanager
def in_time(grader: Grader) -> Iterator[None]:
    """What happens within is not waited for longer than it may take, and a good answer after it is found right."""
    start = time.monotonic()
    yield
    (good,) = grade_math(grader, [respond("1+x")], ["x+1"])
    assert time.monotonic() - start < MOST_SECONDS
    assert good == Verdict(True, "1+x", timed_out=False)


@pytest.mark.parametrize(("gold", "answer"), BOXES.values(), ids=BOXES)
def test_hostile_answers(grader: Grader, gold: str, answer: str) -> None:
    with in_time(grader):
        (verdict,) = grade_math(grader, [respond(answer)], [gold])
    assert not verdict.correct


@pytest.mark.parametrize(("gold", "answer"), ENDLESS.values(), ids=ENDLESS)
def test_endless_answers(grader: Grader, gold: str, answer: str) -> None:
    with in_time(grader):
        (verdict,) = grade_math(grader, [respond(answer)], [gold])
    assert verdict == Verdict(False, answer, timed_out=True)


@pytest.mark.parametrize(("gold", "response"), RESPONSES.values(), ids=RESPONSES)
def test_hostile_responses(grader: Grader, gold: str, response: str) -> None:
    with in_time(grader):
        (strict,) = grade_math(grader, [response], [gold])
        (published,) = grader.grade_published([response], [gold])
    assert not strict.correct
    assert not published.correct or "\\boxed{5}" in response


@pytest.mark.slow
@pytest.mark.parametrize(("gold", "answer"), LONG.values(), ids=LONG)
def test_long_answers(grader: Grader, gold: str, answer: str) -> None:
    with in_time(grader):
        (verdict,) = grade_math(grader, [respond(answer)], [gold])
    assert not verdict.correct


@pytest.mark.slow
@pytest.mark.parametrize(("gold", "answer"), (BOXES | ENDLESS | LONG).values(), ids=BOXES | ENDLESS | LONG)
def test_hostile_answers_the_published_way(grader: Grader, gold: str, answer: str) -> None:
    with in_time(grader):
        (verdict,) = grader.grade_published([respond(answer)], [gold])
    assert not verdict.correct
