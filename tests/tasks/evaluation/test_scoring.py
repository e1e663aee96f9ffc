"""The two scorers beside each other, with the real workers; the paper's way beside lighteval's own metric."""

import pytest
from lighteval.metrics.dynamic_metrics import MultilingualExtractiveMatchMetric
from lighteval.metrics.metrics import Metrics
from lighteval.metrics.utils.extractive_match_utils import ExprExtractionConfig, LatexExtractionConfig
from lighteval.models.model_output import ModelResponse
from lighteval.tasks.requests import Doc
from lighteval.utils.language import Language

from tasks.evaluation.config import EvaluateConfig
from tasks.evaluation.scoring import open_scorer
from tasks.judging.response import Response

# (gold, text, truncated, the prompt opened the reasoning) -> (strict, paper)
MATH = [
    (("7", "<think>1+6</think>\\boxed{7}", False, False), (True, True)),
    (("7", "1+6</think>\\boxed{7}", False, True), (True, True)),
    (("7", "1+6</think>so \\boxed{7} and", True, True), (False, True)),
    (("7", "so \\boxed{7}, but let me check", True, True), (False, True)),
    (("7", "so \\boxed{7}, done", False, True), (False, True)),
    (("7", "so \\boxed{7}, done", False, False), (True, True)),
    (("7", "the final answer is 8</think>\\boxed{7}", False, True), (True, True)),
    (("7", "\\boxed{7}</think>\\boxed{8}", False, True), (False, False)),
    (("7", "\\boxed{7}</think>I do not know.", False, True), (False, True)),
    (("25", "</think>$\\boxed{25\\%}$", False, True), (True, False)),
    (("\\frac{1}{2}", "</think>\\boxed{0.5}", False, True), (True, True)),
    (("1/3", "</think>\\boxed{0.333333}", False, True), (False, True)),
    (("14", "</think>**Answer:** 14 bags.", False, True), (True, True)),
    (("14", "</think>It takes 14 bags.", False, True), (False, True)),
    (("7", "Let me try x = 7 first", True, True), (False, True)),
]


@pytest.fixture(scope="module")
def math_scores():
    with open_scorer(EvaluateConfig(kind="math"), []) as score:
        return score([Response(*case[1:]) for case, _ in MATH], [case[0] for case, _ in MATH])


def test_strict_and_paper_on_free_form_answers(math_scores):
    assert [(s.strict.correct, s.paper.correct) for s in math_scores] == [expected for _, expected in MATH]


def test_the_papers_scorer_is_lightevals_metric_with_the_harnesses_settings(math_scores):
    """ruikangliu/Quantized-Reasoning-Models, lighteval_custom/tasks/reasoning.py: boxed first, precision 5."""
    metric = MultilingualExtractiveMatchMetric(
        language=Language.ENGLISH,
        gold_extraction_target=(LatexExtractionConfig(),),
        pred_extraction_target=(ExprExtractionConfig(), LatexExtractionConfig(boxed_match_priority=0)),
        fallback_mode="first_match",
        precision=5,
        aggregation_function=max,
    )
    for (gold, text, *_), found in zip((case for case, _ in MATH), math_scores, strict=True):
        doc = Doc(query="", choices=[f"${gold}$"], gold_index=0)
        assert metric.compute(doc, ModelResponse(text=[text])) == found.paper.correct, text


CHOICE = [
    (("B", "hm, A?</think>Answer: B", False, True), (True, True)),
    (("B", "hm, A?</think>**Answer:** B", False, True), (True, True)),
    (("B", "hm, A?</think>\\boxed{B}", False, True), (True, True)),
    (("B", "hm, Answer: B, or not", True, True), (False, True)),
    (("B", "hm</think>Answer: B", True, True), (False, True)),
    (("B", "hm</think>the option is B.", False, True), (False, True)),
    (("B", "Answer: C</think>Answer: B", False, True), (True, True)),
    (("B", "Answer: B</think>Answer: C", False, True), (False, False)),
    (("B", "no idea", False, False), (False, False)),
    (("B", "Answer: B", False, False), (True, True)),
]


def test_strict_and_paper_on_choices_and_lightevals_metric():
    with open_scorer(EvaluateConfig(kind="choice"), []) as score:
        scores = score([Response(*case[1:]) for case, _ in CHOICE], [case[0] for case, _ in CHOICE])
    assert [(s.strict.correct, s.paper.correct) for s in scores] == [expected for _, expected in CHOICE]
    metric = Metrics.gpqa_instruct_metric.value.sample_level_fn
    for (gold, text, *_), found in zip((case for case, _ in CHOICE), scores, strict=True):
        doc = Doc(query="", choices=list("ABCD"), gold_index="ABCD".index(gold))
        assert metric.compute(doc, ModelResponse(text=[text])) == found.paper.correct, text
