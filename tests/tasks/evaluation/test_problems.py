"""Reading, checking and choosing problems."""

import pandas as pd
import pytest

from tasks.evaluation.problems import load_problems
from tasks.runtime.stage import StageError


def dataset(folder, rows):
    frame = pd.DataFrame(rows, columns=["id", "prompt", "response", "answer", "tier"]).astype(str).assign(details="")
    frame.to_parquet(folder / "data.parquet")
    return folder


def numbered(num):
    return [(f"p{i}", f"question {i}", "", str(i), "easy") for i in range(num)]


def test_all_problems_come_in_the_order_of_the_data(tmp_path):
    problems = load_problems(dataset(tmp_path, numbered(5)), None)
    assert [problem.id for problem in problems] == ["p0", "p1", "p2", "p3", "p4"]
    assert vars(problems[3]) == {"id": "p3", "prompt": "question 3", "answer": "3", "tier": "easy", "details": ""}


def test_a_choice_is_independent_of_order_and_nested(tmp_path):
    def ids(rows, num):
        return [problem.id for problem in load_problems(dataset(tmp_path, rows), num)]

    ten = ids(numbered(100), 10)
    assert len(ten) == 10
    assert set(ids(numbered(100)[::-1], 10)) == set(ten)
    assert set(ten) < set(ids(numbered(100), 20))
    assert max(int(problem_id[1:]) for problem_id in ten) > 50, "the choice should not be the first ten"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "is empty"),
        ([("a", "", "some text", "", "")], "'a' has no prompt"),
        ([("a", "q", "", "1", ""), ("b", "q", "", "", "")], "'b' has no answer"),
        ([("a", "q", "", "1", ""), ("a", "r", "", "2", "")], "'a' occurs twice"),
    ],
)
def test_unusable_data_is_refused(tmp_path, rows, message):
    with pytest.raises(StageError, match=message):
        load_problems(dataset(tmp_path, rows), None)


def test_too_many_problems_asked_for(tmp_path):
    with pytest.raises(StageError, match=r"num_problems is 6.*holds 5: lower num_problems"):
        load_problems(dataset(tmp_path, numbered(5)), 6)


def test_missing_or_foreign_data_is_refused(tmp_path):
    with pytest.raises(StageError, match=r"no data\.parquet"):
        load_problems(tmp_path, None)
    pd.DataFrame({"text": ["a"]}).to_parquet(tmp_path / "data.parquet")
    with pytest.raises(StageError, match="columns id, prompt, answer, tier, details"):
        load_problems(tmp_path, None)
