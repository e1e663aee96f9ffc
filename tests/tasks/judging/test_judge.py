"""One judge: whatever a completion looks like, its reward in training is its strict score in evaluation."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

from tasks.evaluation.config import UNSAMPLED, EvaluateConfig
from tasks.evaluation.scoring import open_scorer
from tasks.judging.judge import check_judge, open_judge
from tasks.judging.questions import Problem
from tasks.judging.response import Response
from tasks.judging.sandbox import why_unavailable
from tasks.runtime.machine import keyed_versions
from tasks.runtime.stage import StageError

REPOSITORY = Path(__file__).parents[3]
SERIES = f"{sys.version_info.major}.{sys.version_info.minor}"
TESTS = json.dumps([{"input": "3", "output": "6\n", "type": "stdin"}])
ANSWERS = {  # right, wrong, and not found, before what surrounds them
    "math": ("7", ["so \\boxed{7}", "the answer is 7.", "\\boxed{8}", "7 bags", ""]),
    "choice": ("B", ["Answer: B", "\\boxed{B}", "Answer: C", "B?", ""]),
    "code": (TESTS, [
        "```python\nprint(int(input()) * 2)\n```", "```\nprint(int(input()) * 2)\n```", "```python\nprint(1)\n```",
        "print(6)", "",
    ]),
}  # fmt: skip
FRAMES = [
    "{}",
    "<think>hm</think>{}",
    "hm</think>{}",
    "<think>{}",
    "{}</think>",
    "<think>{}</think>done",
    "{} and then",
]


@pytest.mark.parametrize("kind", ANSWERS)
def test_reward_and_strict_score_are_the_same_verdict(kind):
    if kind == "code" and (reason := why_unavailable()):
        pytest.skip(reason)
    truth, answers = ANSWERS[kind]
    responses = [
        Response(frame.format(answer), truncated, opened)
        for frame, answer, truncated, opened in product(FRAMES, answers, (False, True), (False, True))
    ]
    problem = Problem("p", "?", "the gold", "", truth) if kind == "code" else Problem("p", "?", truth, "", "")
    config = EvaluateConfig(kind=kind)
    with open_judge(kind) as judge, open_scorer(config, [problem]) as score:
        rewards = judge(responses, [truth] * len(responses))
        scores = score(responses, [problem.answer] * len(responses))
    assert [verdict.correct for verdict in rewards] == [found.strict.correct for found in scores]
    assert [verdict.extracted for verdict in rewards] == [found.strict.extracted for found in scores]
    right = {response for response, verdict in zip(responses, rewards, strict=True) if verdict.correct}
    assert not any(response.truncated for response in right)
    assert Response(answers[0], False, False) in right, "no tags, and none was opened: all of it is the answer"
    assert Response(f"<think>hm</think>{answers[0]}", False, False) in right
    assert Response(f"hm</think>{answers[0]}", False, True) in right
    for wrong in (Response(answers[0], False, True), Response(f"<think>{answers[0]}", False, False)):
        assert wrong not in right, "the reasoning was never ended"


def test_nothing_but_programs_needs_a_sandbox(monkeypatch):
    monkeypatch.setattr("tasks.judging.sandbox.why_unavailable", lambda: "bubblewrap (bwrap) is not installed")
    for kind in ("math", "choice", "loglikelihood"):
        check_judge(kind, unsafe_code=False)
    check_judge("code", unsafe_code=True)
    with pytest.raises(StageError, match=r"bwrap.*unsafe_code=true"):
        check_judge("code", unsafe_code=False)


def test_whatever_bubblewrap_says_is_told_in_one_line(monkeypatch):
    monkeypatch.setattr("tasks.judging.sandbox.why_unavailable", lambda: "bwrap: no\n" * 1000)
    with pytest.raises(StageError, match=r"bwrap.*unsafe_code=true") as error:
        check_judge("code", unsafe_code=False)
    assert len(str(error.value)) <= 300


@pytest.mark.parametrize("stage", ["evaluate", "grpo_train"])
def test_a_missing_sandbox_is_told_by_the_stages_check_before_anything_computes(stage, monkeypatch):
    import tasks.evaluate
    import tasks.grpo_train

    monkeypatch.setattr("tasks.judging.sandbox.why_unavailable", lambda: "bubblewrap (bwrap) is not installed")
    declared = {"evaluate": tasks.evaluate.evaluate, "grpo_train": tasks.grpo_train.grpo_train}[stage]
    declared.check(declared.config_type())
    declared.check(declared.config_type(kind="code", unsafe_code=True))
    with pytest.raises(StageError, match="bwrap"):
        declared.check(declared.config_type(kind="code"))


@pytest.mark.parametrize(
    ("kind", "deciding"), [("math", {"math-verify"}), ("choice", set()), ("code", {"python", "numpy"})]
)
def test_versions_that_decide_verdicts_are_keyed_for_the_kinds_that_they_decide(kind, deciding):
    from tasks.evaluate import evaluate
    from tasks.grpo_train import grpo_train

    for stage in (evaluate, grpo_train):
        named = set(stage.packages(stage.config_type(kind=kind)))
        assert named & {"math-verify", "python", "numpy"} == deciding
    keyed = keyed_versions(deciding)
    assert keyed.keys() == deciding
    assert keyed.get("python", SERIES) == SERIES


IMPORTS = """
import sys
import tasks.grpo_train, tasks.training.policy_training, tasks.judging.judge
print([name for name in sys.modules if name.partition(".")[0] in ("lighteval", "vllm")])
"""


def test_training_and_judging_import_nothing_of_lighteval():
    command = [sys.executable, "-c", IMPORTS]
    assert subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY).stdout == "[]\n"


def test_options_are_scored_by_what_was_taken():
    config = EvaluateConfig(kind="loglikelihood", seeds=(1,), generation=UNSAMPLED)
    with open_scorer(config, []) as score:
        found = score([Response("B", False, False), Response("C", False, False)], ["B", "B"])
    assert [scores.strict.correct for scores in found] == [True, False]
