"""Both scorers against another harness's verdicts, against gold answers, and against lighteval; see docs/graders.md.

Skipped where the data is absent.
"""

import gzip
import json
from pathlib import Path

import pytest
from lighteval.metrics.dynamic_metrics import MultilingualExtractiveMatchMetric
from lighteval.metrics.utils.extractive_match_utils import ExprExtractionConfig, LatexExtractionConfig
from lighteval.models.model_output import ModelResponse
from lighteval.tasks.requests import Doc

from tasks.evaluation.scoring import score_math
from tasks.judging.math_answer import Grader
from tasks.judging.response import Response

DATA = Path(__file__).parents[4] / "shared" / "data"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="the samples of real data are not here")

OTHER_HARNESS_IS_WRONG = {  # docs/graders.md has the reason for each
    "olympiadbench-92-Qwen-2.5-3B-rlft",
    "olympiadbench-126-Qwen-2.5-3B-rlft",
    "olympiadbench-248-Qwen-2.5-3B-rlft",
    "olympiadbench-260-Qwen-2.5-3B-rlft",
    "olympiadbench-348-Qwen-2.5-3B-rlft",
    "olympiadbench-237-Qwen2.5-3B-Instruct",
}
PERCENT = {"gsm8k-348-Qwen2.5-3B-Instruct", "gsm8k-1239-Qwen2.5-3B-Instruct"}


@pytest.fixture(scope="module")
def grader():
    with Grader() as opened:
        yield opened


def rows(name):
    path = DATA / name
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in text.splitlines()]


def trace(row):
    reasoning, response = row["reasoning"], row["response"]
    return f"<think>\n{reasoning}" if response is None else f"<think>\n{reasoning}\n</think>\n\n{response}"


@pytest.mark.slow
def test_another_harness_agrees_but_for_the_explained(grader):
    rollouts = rows("graded_rollouts/rollouts.jsonl.gz")
    scores = score_math(grader, [Response(r["output"], False, False) for r in rollouts], [r["gold"] for r in rollouts])
    strict = {r["id"] for r, s in zip(rollouts, scores, strict=True) if s.strict.correct != r["score"]}
    paper = {r["id"] for r, s in zip(rollouts, scores, strict=True) if s.paper.correct != r["score"]}
    assert len(rollouts) == 800
    assert strict == OTHER_HARNESS_IS_WRONG
    assert paper == OTHER_HARNESS_IS_WRONG | PERCENT
    assert not any(s.strict.timed_out or s.paper.timed_out for s in scores)


def test_every_gold_answer_equals_itself_boxed_at_the_end_of_a_trace(grader):
    names = ("math/math500_visible52.jsonl.gz", "aime/aime2022.jsonl", "aime/aime_1983_2021.jsonl.gz")
    golds = [row["answer"] for name in names for row in rows(name)]
    golds += [row["final"] for row in rows("gsm8k/test_visible100.jsonl")]
    reasoning = "<think>\nSuppose $x=3$, so \\boxed{99}, or \\(y\\) perhaps.\n</think>\n\n"
    responses = [Response(f"{reasoning}So \\[ \\boxed{{{gold}}} \\]", False, True) for gold in golds]
    scores = score_math(grader, responses, golds)
    assert len(golds) == 1089
    wrong = [gold for gold, s in zip(golds, scores, strict=True) if not (s.strict.correct and s.paper.correct)]
    assert wrong == []


def test_the_scorers_agree_on_what_another_model_boxed(grader):
    answers = rows("math/qwen3_final_answers_visible52.jsonl")
    responses = [Response(f"</think>{row['prediction']}", False, True) for row in answers]
    scores = score_math(grader, responses, [row["answer"] for row in answers])
    assert [s.strict.correct for s in scores] == [s.paper.correct for s in scores]
    assert sum(s.strict.correct for s in scores) == 25


@pytest.mark.slow
def test_the_papers_scorer_gives_lightevals_verdicts_on_real_texts(grader):
    """Settings of the paper's harness; its gold for MATH-500 is the whole solution, here the answer."""
    cases = [(r["answer"], trace(r)) for r in rows("reasoning_traces/math500_traces.jsonl.gz")]
    cases += [(r["answer"], trace(r)) for r in rows("reasoning_traces/gsm8k_traces.jsonl.gz")]
    cases += [(r["gold"], r["output"]) for r in rows("graded_rollouts/rollouts.jsonl.gz")]
    metric = MultilingualExtractiveMatchMetric(
        gold_extraction_target=(LatexExtractionConfig(),),
        pred_extraction_target=(ExprExtractionConfig(), LatexExtractionConfig(boxed_match_priority=0)),
        precision=5,
    )
    ours = grader.grade_published([text for _, text in cases], [gold for gold, _ in cases])
    for (gold, text), verdict in zip(cases, ours, strict=True):
        doc = Doc(query="", choices=[f"${gold}$"], gold_index=0)
        assert verdict.correct == (metric.compute(doc, ModelResponse(text=[text])) == 1.0), (gold, text[-100:])
