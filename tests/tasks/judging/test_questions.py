"""What is asked: free-form as the data words it, multiple choice permuted for each seed and problem."""

import json
from collections import Counter

import pytest

from tasks.judging.questions import Problem, Question, ask, permutation
from tasks.runtime.stage import StageError

CHOICES = ["one", "two", "three\n", "four"]
PROBLEM = Problem("p", "Which {A}?", "one", "Physics", json.dumps({"choices": CHOICES}))


def test_a_free_form_question_is_problem_and_suffix_under_every_seed():
    problem = Problem("p", "1+1?", "2", "easy", "")
    expected = Question("p", "1+1?\n\nBox it.", "2", "easy", "")
    assert ask("math", problem, 42, "\n\nBox it.") == ask("math", problem, 43, "\n\nBox it.") == expected


def test_a_multiple_choice_question_is_worded_as_in_simple_evals():
    question = ask("choice", PROBLEM, 42, "")
    order = json.loads(question.details)["order"]
    assert sorted(order) == [0, 1, 2, 3]
    a, b, c, d = (CHOICES[i] for i in order)
    assert question.prompt == (
        "Answer the following multiple choice question. The last line of your response should be of the following "
        "format: 'Answer: $LETTER' (without quotes) where LETTER is one of ABCD. Think step by step before answering."
        f"\n\nWhich {{A}}?\n\nA) {a}\nB) {b}\nC) {c}\nD) {d}"
    )
    assert order["ABCD".index(question.gold)] == 0 and question.tier == "Physics"


def test_permutations_follow_seed_and_problem_and_are_even():
    assert permutation(4, 42, "p") == permutation(4, 42, "p")
    orders = [tuple(permutation(4, seed, f"p{i}")) for seed in (42, 43, 44) for i in range(800)]
    assert orders[:800] != orders[800:1600]
    counts = Counter(orders)
    assert len(counts) == 24 and max(counts.values()) < 150 and min(counts.values()) > 60  # 100 expected, sd 10
    same_letter = sum(a.index(0) == b.index(0) for a, b in zip(orders[:800], orders[800:1600], strict=True))
    assert 140 < same_letter < 260, "seeds should be independent: a quarter of 800, sd 12"


@pytest.mark.parametrize("details", ["", "{}", '{"choices": ["a", "b"]}'])
def test_a_problem_without_four_choices_is_refused(details):
    with pytest.raises(StageError, match=r"'p' has \d choices and needs 4: set kind=math"):
        ask("choice", Problem("p", "q", "a", "", details), 42, "")
