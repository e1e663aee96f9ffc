r"""Which answers are equal: lists of right paraphrases and near misses, each with the verdict that it deserves."""

import json
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.judging.equality import compare
from tasks.judging.latex import clean
from tasks.judging.math_answer import Grader, quick_verdict
from tasks.judging.quantities import based_number, exact_number, quantity

# 575 answers of the kinds that competition problems have, and 163 that were written by others.
OWN = Path(__file__).with_name("answers.jsonl")
OTHERS = Path(__file__).parents[4] / "shared" / "cases" / "answers.jsonl"
MOST_WRONG = 0.04
PIECES = [
    *(
        "\\boxed{",
        "}",
        "{",
        "(",
        ")",
        "[",
        "]",
        "\\{",
        "\\}",
        ",",
        ";",
        " ",
        "1",
        "2",
        "34",
        "567",
        "x",
        "y",
        "\\text{",
        "cm",
    ),
    *(
        " or ",
        "\\text{ and }",
        "\\pm",
        "\\mp",
        "=",
        "<",
        ">",
        "\\le",
        "\\in",
        "\\cup",
        "\\frac",
        "\\frac{1}{2}",
        "^",
        "_",
    ),
    *(
        "^\\circ",
        "\\%",
        "$",
        "\\$",
        "\\begin{pmatrix}",
        "\\end{pmatrix}",
        "&",
        "\\\\",
        "\\",
        "\\overline{",
        "...",
        ".",
        "/",
    ),
    *(
        "-",
        "\\sqrt{",
        "|",
        ":",
        "e",
        "i",
        "\\approx",
        "\\,",
        "\\!",
        "{,}",
        "\\infty",
        "\\mathbb{R}",
        "\\dot{3}",
        "10^",
        "e9",
    ),
    *("5 cm ", "\\ne", "(A)", "\ud800", "\u0666", "\u00b2", "thousand", "_{\\text{two}}"),
]


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader(num_workers=1) as opened:
        yield opened


def wrong_verdicts(grader: Grader, path: Path) -> tuple[list[dict[str, str]], int]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    verdicts = grader.grade_answers([row["answer"] for row in rows], [row["gold"] for row in rows])
    assert not any(verdict.timed_out for verdict in verdicts)
    pairs = zip(rows, verdicts, strict=True)
    return [row for row, verdict in pairs if verdict.correct != (row["verdict"] == "right")], len(rows)


def test_answers_get_the_verdict_that_they_deserve(grader: Grader) -> None:
    wrong, _ = wrong_verdicts(grader, OWN)
    assert [(row["gold"], row["answer"]) for row in wrong] == [("9", "\\text{nine}")]


@pytest.mark.skipif(not OTHERS.is_file(), reason="the list of others is not here")
def test_answers_that_others_wrote_get_it_too(grader: Grader) -> None:
    wrong, count = wrong_verdicts(grader, OTHERS)
    assert len(wrong) <= MOST_WRONG * count, wrong


@pytest.mark.parametrize(
    ("gold", "answer", "verdict"),
    [
        ("3/2", "1 1/2", True),
        ("11/2", "1 1/2", False),
        ("2100", "2, 100", False),
        ("121/2", "1 21/2", False),
        ("[0,1)", "(0,1)", False),
        ("\\{1,2\\}", "(1,2)", False),
        ("101_2", "101_{3}", False),
        ("75 \\text{ cents}", "\\$0.75", True),
        ("\\$5", "5\\%", False),
        ("204", "204 \\text{ is wrong}", False),
        ("204", "\\bm{204}", True),
        ("1/3", "0.\\overline{3}", True),
        ("(3,4]", "3 < x \\le 4", True),
        ("x^2-1", "(x-1)(x+1)", None),
    ],
)
def test_structure_decides_without_algebra(gold: str, answer: str, verdict: bool | None) -> None:
    assert compare(gold, answer, lambda *_: None) is verdict


def test_algebra_is_asked_for_values_only() -> None:
    asked: list[tuple[str, str]] = []
    compare("(\\sqrt{8}, 3)", "(2\\sqrt2, 3.0)", lambda *question: asked.append(question))
    assert set(asked) == {("\\sqrt{8}", "2\\sqrt2")}


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ("12", Fraction(12)),
        ("-3.50", Fraction(-7, 2)),
        ("+.5", Fraction(1, 2)),
        ("4.", Fraction(4)),
        ("6/8", Fraction(3, 4)),
        ("-\\frac{6}{8}", Fraction(-3, 4)),
        ("\\frac34", Fraction(3, 4)),
        ("1,234,567", Fraction(1234567)),
        ("1{,}000.5", Fraction(2001, 2)),
        ("1/0", None),
        ("12,34", None),
        ("1e5", Fraction(100_000)),
        ("1 1/2", Fraction(3, 2)),
        ("-1\\tfrac12", Fraction(-3, 2)),
        ("1 21/2", None),
        ("1 2", None),
        ("1 234", Fraction(1234)),
        ("1\\,234", Fraction(1234)),
        ("1\u2009234", Fraction(1234)),
        ("2, 100", None),
        ("- 9", Fraction(-9)),
        ("1.5 \\times 10^{-3}", Fraction(3, 2000)),
        ("10^{6}", Fraction(1_000_000)),
        ("10^{999999}", None),
        ("1e99999999999", None),
        ("0.1\\overline{6}", Fraction(1, 6)),
        ("0.(27)", Fraction(3, 11)),
        ("0.\\dot{3}", Fraction(1, 3)),
        ("0.\\dot{1}4285\\dot{7}", Fraction(1, 7)),
        ("0.333...", Fraction(1, 3)),
        ("0.1818\\ldots", Fraction(2, 11)),
        ("3.14159\\ldots", None),
        ("x", None),
        ("--1", None),
    ],
)
def test_exact_number(answer: str, value: Fraction | None) -> None:
    assert exact_number(clean(answer)) == value


@pytest.mark.parametrize(
    ("text", "value", "dimension"),
    [
        ("5.4 \\text{ cents}", "5.4", "money"),
        ("\\$18.90", "18.90", "money"),
        ("12 \\text{ cm}^2", "12", "length^2"),
        ("12 \\text{ square inches}", "12", "long^2"),
        ("90^{\\circ}", "90", "degrees"),
        ("20^\\circ\\text{C}", "20", "celsius"),
        ("25\\%", "25", "percent"),
        ("25 km", "25", "length"),
        ("204 \\text{ ways}", "204", ""),
    ],
)
def test_units_are_told_from_values(text: str, value: str, dimension: str) -> None:
    found = quantity(clean(text))
    assert found.unit is not None
    assert (found.value, found.unit.dimension) == (value, dimension)


@pytest.mark.parametrize(
    "text", ["204 \\text{ is wrong}", "5 \\text{ or so}", "2x", "\\sin 30^\\circ", "\\text{at least } 5"]
)
def test_what_is_no_unit_stays(text: str) -> None:
    assert quantity(clean(text)).value == clean(text)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("2516_8", ("2516", 8)),
        ("2516_{\\text{eight}}", ("2516", 8)),
        ("(101)_{2}", ("101", 2)),
        ("\\text{1a}_{16}", ("1A", 16)),
        ("102_2", None),
        ("x_2", None),
        ("a_1", None),
    ],
)
def test_bases(text: str, number: tuple[str, int] | None) -> None:
    assert based_number(clean(text)) == number


@given(st.lists(st.sampled_from(PIECES), max_size=30), st.lists(st.sampled_from(PIECES), max_size=8))
def test_no_answer_breaks_the_comparison(answer: list[str], gold: list[str]) -> None:
    assert quick_verdict("".join(gold), "".join(answer)) in (True, False, None)


@pytest.mark.parametrize("piece", [*PIECES, "1,", "x,", "(1,", "x<", "\\pm 1,", "\\frac{1}{", "a or "])
def test_the_longest_answers_are_compared_at_once(piece: str) -> None:
    answer = (piece * 1000)[:990]
    start = time.process_time()
    for text in (answer, f"({answer})", f"1{answer}x"):
        quick_verdict("5", text)
    assert time.process_time() - start < 1
