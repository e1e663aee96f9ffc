"""Our lighteval tasks.  lighteval's own definitions differ from the paper's prompts and budgets, so none is used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tasks.evaluation.lighteval_compat import (
    Doc,
    LightevalTaskConfig,
    ModelResponse,
    SampleLevelComputation,
    SampleLevelMetric,
    SamplingMethod,
)
from tasks.rewards.math_answer import Verdict

Grade = Callable[[Sequence[str], Sequence[str]], list[Verdict]]


@dataclass
class SampledResponse(ModelResponse):
    """lighteval's response with what it has no field for; `verdict` is set when the response has been scored."""

    finish_reason: str = ""
    verdict: Verdict | None = None


class AnswerAccuracy(SampleLevelComputation):
    """1.0 where the response's final answer equals the gold answer: the verifier that is also the GRPO reward.

    All responses of a run are graded in one call, since the grader works in other processes.  A response that was cut
    off at max_new_tokens is graded like any other: right only if its boxed answer was already there.
    """

    def __init__(self, grade: Grade) -> None:
        self._grade = grade

    def __deepcopy__(self, memo: dict[int, Any]) -> AnswerAccuracy:
        return self  # the registry deep-copies tasks, and the grader's worker processes cannot be copied

    def compute(  # type: ignore[override]  # lighteval calls batched metrics with these two lists
        self, responses: list[SampledResponse], docs: list[Doc]
    ) -> list[float]:
        verdicts = self._grade([response.text[0] for response in responses], [doc.get_golds()[0] for doc in docs])
        for response, verdict in zip(responses, verdicts, strict=True):
            response.verdict = verdict
        return [float(verdict.correct) for verdict in verdicts]


def math_task(name: str, folder: Path, prompt_suffix: str, grade: Grade) -> LightevalTaskConfig:
    """Free-form problems in `folder` (see problems.write_lighteval_folder), scored by their boxed final answer."""

    def document(row: dict[str, Any], task_name: str) -> Doc:
        return math_document(row, prompt_suffix, task_name)

    accuracy = SampleLevelMetric(
        metric_name="accuracy",
        higher_is_better=True,
        category=SamplingMethod.GENERATIVE,
        sample_level_fn=AnswerAccuracy(grade),
        corpus_level_fn=np.mean,
        batched_compute=True,
    )
    return LightevalTaskConfig(
        name=name,
        prompt_function=document,
        hf_repo=str(folder),
        hf_subset="default",
        hf_avail_splits=("test",),
        evaluation_splits=("test",),
        few_shots_split="test",  # none is used, but lighteval warns where no split is named
        metrics=(accuracy,),
    )


def math_document(row: dict[str, Any], prompt_suffix: str, task_name: str = "") -> Doc:
    """One problem, a row with id, prompt, answer and tier, as lighteval's document."""
    return Doc(
        query=row["prompt"] + prompt_suffix,
        choices=[row["answer"]],
        gold_index=0,
        specific={"id": row["id"], "tier": row["tier"]},
        task_name=task_name,
    )


def specifics(doc: Doc) -> dict[str, str]:
    """What a document of ours carries beside lighteval's fields: id and tier of the problem."""
    assert doc.specific is not None, "math_document sets it"
    return doc.specific
