import hashlib
import json
import re
from collections import Counter

import pytest

from tasks.data.bundled_problems import (
    MAX_VALUE,
    SPLITS,
    TIERS,
    Step,
    bundled_drills,
    bundled_problems,
    bundled_stories,
    canonical_content,
    split_of,
)

OPERATIONS = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
}
_TIMES = {"doubles": 2, "triples": 3, "quadruples": 4}


def _chain_from_text(prompt: str) -> str:
    """The canonical content, read back from the English (an independent parser of the problem's sentences)."""
    parts = [re.match(r"\w+ has (\d+) ", prompt)[1]]
    for sentence in re.split(r"(?<=\.) ", prompt)[1:]:
        if match := re.search(r"opens (\d+) boxes of (\d+)", sentence):
            parts.append(f"boxes {match[1]} {match[2]}")
        elif match := re.search(r"ships (\d+) bags of (\d+)", sentence):
            parts.append(f"bags {match[1]} {match[2]}")
        elif match := re.search(r"into (\d+) parts", sentence):
            parts.append(f"split {match[1]}")
        elif match := re.search(r"(doubles|triples|quadruples) the pile", sentence):
            parts.append(f"times {_TIMES[match[1]]}")
        elif "as many as at the start" in sentence:
            parts.append("echo")
        elif match := re.search(r"(\d+) more", sentence):
            parts.append(f"gain {match[1]}")
        elif (match := re.search(r"\w+ (\d+) \w+\.$", sentence)) and " has " not in sentence:
            parts.append(f"lose {match[1]}")
    return ";".join(parts)


def _solve(chain: str) -> int:
    """The answer of a canonical content by a plain walk over its operations."""
    first, *operations = chain.split(";")
    value = start = int(first)
    for operation in operations:
        kind, *numbers = operation.split()
        a, *b = [int(n) for n in numbers] or [0]
        value = {
            "gain": lambda v, a, b: v + a,
            "lose": lambda v, a, b: v - a,
            "times": lambda v, a, b: v * a,
            "split": lambda v, a, b: v // a,
            "echo": lambda v, a, b: v + start,
            "boxes": lambda v, a, b: v + a * b[0],
            "bags": lambda v, a, b: v - a * b[0],
        }[kind](value, a, b)
    return value


@pytest.mark.parametrize("split", SPLITS)
def test_every_problem_lies_in_the_split_that_its_own_text_selects(split):
    for row in bundled_problems(split, 20 if split == "validation" else 400, seed=11):
        assert split_of(_chain_from_text(row["prompt"])) == split


def test_splits_are_disjoint_over_many_draws():
    chains = {
        split: {_chain_from_text(row["prompt"]) for seed in (1, 2) for row in bundled_problems(split, count, seed)}
        for split, count in {"train": 700, "calibration": 700, "validation": 60, "test": 700}.items()
    }
    assert chains.keys() == set(SPLITS)
    assert len(set.union(*chains.values())) == sum(map(len, chains.values()))


def test_validation_took_no_problem_from_what_models_were_made_with():
    """Digests of the recipes' draws, from before there was a validation split."""
    curriculum = [
        row for step in range(8) for row in bundled_problems("train", 18, step) + bundled_stories("train", 1, step)
    ]
    drawn = {
        "48112e1b39c1700a": bundled_problems("calibration", 256, 5),
        "667e88d0edf8a12c": bundled_stories("calibration", 256, 5),
        "2c4d1db214077522": bundled_problems("calibration", 500, 4321),
        "79dac6478ac01ca9": bundled_problems("train", 1024, 4242),
        "6be424baeb13994c": bundled_stories("train", 512, 4242),
        "3e464dba93ac60e9": bundled_problems("train", 1024, 77),
        "10c5f513a19ccafd": bundled_problems("test", 500, 999),
        "6160345c115b22bf": curriculum,
    }
    for expected, rows in drawn.items():
        assert hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16] == expected


def test_split_law_ignores_wording_and_covers_the_declared_shares():
    counts = Counter(split_of(f"{start};gain {n};lose 1") for start in range(1, 101) for n in range(1, 101))
    assert counts["calibration"] / 10_000 == pytest.approx(0.05, abs=0.01)
    assert counts["validation"] / counts["calibration"] == pytest.approx(1 / 80, abs=0.01)
    assert counts["train"] / 10_000 == pytest.approx(0.90, abs=0.01)
    assert counts["test"] / 10_000 == pytest.approx(0.05, abs=0.01)
    assert canonical_content(12, [Step("gain", (7,), ()), Step("echo", (), ())]) == "12;gain 7;echo"


def test_answers_follow_from_the_text_alone():
    for row in bundled_problems("test", 400, seed=3):
        assert _solve(_chain_from_text(row["prompt"])) == int(row["answer"]), row["prompt"]


def test_traces_are_true_bounded_and_end_in_the_answer():
    for row in bundled_problems("train", 400, seed=5):
        trace, _, final = row["response"].partition("</think>")
        assert trace.startswith("<think>\nstart ")
        equations = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", trace)
        for left, operator, right, result in equations:
            assert OPERATIONS[operator](int(left), int(right)) == int(result)
            assert 1 <= int(result) <= MAX_VALUE
        assert final == f"\n\\boxed{{{row['answer']}}}"
        num_steps = len(equations) - trace.count("\nCheck:")
        assert num_steps in TIERS[row["tier"]]


def test_draws_are_reproducible_prefixes_and_differ_by_seed():
    rows = bundled_problems("test", 60, seed=7)
    assert bundled_problems("test", 20, seed=7) == rows[:20]
    assert {row["id"] for row in rows}.isdisjoint(row["id"] for row in bundled_problems("test", 60, seed=8))
    assert len({row["prompt"] for row in rows}) == 60
    assert set(rows[0]) == {"id", "prompt", "response", "answer", "tier"}


def test_tiers_restrict_and_are_otherwise_all_present():
    assert {row["tier"] for row in bundled_problems("test", 60, seed=1, tiers=["4"])} == {"4"}
    counts = Counter(row["tier"] for row in bundled_problems("train", 1000, seed=1))
    assert counts["2-3"] == pytest.approx(400, abs=60)
    assert counts["5-6"] == pytest.approx(400, abs=60)


def test_stories_have_no_arithmetic_and_keep_their_split():
    for split in SPLITS:
        rows = bundled_stories(split, 10 if split == "validation" else 50, seed=2)
        assert all(row["prompt"] == "" and not re.search(r"\d|[+*/=]", row["response"]) for row in rows)
        assert all(split_of(row["response"]) == split for row in rows)


def test_drills_are_true():
    for drill in bundled_drills(500, seed=4):
        left, operator, right, _, result = drill.split()
        assert OPERATIONS[operator](int(left), int(right)) == int(result)
        assert 0 < int(result) <= MAX_VALUE


def test_bad_arguments_name_what_is_allowed():
    with pytest.raises(ValueError, match="train, calibration, test"):
        bundled_problems("dev", 1, seed=0)
    with pytest.raises(ValueError, match="2-3, 4, 5-6"):
        bundled_problems("train", 1, seed=0, tiers=["7"])
    with pytest.raises(ValueError, match="2-3, 4, 5-6"):
        bundled_problems("train", 1, seed=0, tiers=[])
    with pytest.raises(ValueError, match="negative"):
        bundled_stories("train", -1, seed=0)
