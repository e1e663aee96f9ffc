"""Our engines as a lighteval model, and one run of lighteval's pipeline over it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tasks.data.prompts import opens_reasoning, render_prompt
from tasks.evaluation.lighteval_compat import (
    Doc,
    EvaluationTracker,
    GenerationParameters,
    LightevalModel,
    LightevalTaskConfig,
    ModelConfig,
    ParallelismManager,
    Pipeline,
    PipelineParameters,
    PromptManager,
)
from tasks.evaluation.lighteval_tasks import SampledResponse, specifics
from tasks.evaluation.likelihood import choose_options
from tasks.sampling.engine import Request
from tasks.sampling.journal import Generation
from tasks.sampling.sampler import Sampler, Tally
from tasks.sampling.tokens import request_seed, response_text

DOCS_TOGETHER = 256
"""Documents whose options are scored between two signs of life."""


class ChatPrompts(PromptManager):
    """lighteval's PromptManager over the chat rendering that training uses too.

    lighteval's own cannot pass Qwen3's thinking switch to the template.  Our tasks have neither few-shot examples nor
    instructions: a document is one user turn.
    """

    def __init__(self, tokenizer: Any, enable_thinking: bool | None) -> None:
        super().__init__(use_chat_template=True, tokenizer=tokenizer, system_prompt=None)
        self._enable_thinking = enable_thinking

    def _prepare_chat_template(self, doc: Doc, tokenize: bool = True) -> str:
        """Text of the prompt (the name is lighteval's); StageError for a tokenizer without chat template."""
        return render_prompt(self.tokenizer, doc.query, self._enable_thinking)

    def opens_reasoning(self, doc: Doc) -> bool:
        """Whether the prompt ends inside the reasoning, so that the response begins there."""
        return opens_reasoning(self.prepare_prompt(doc))

    def token_ids(self, doc: Doc) -> tuple[int, ...]:
        """Prompt tokens; the template writes the special tokens itself, so none is added (no double BOS)."""
        return tuple(self.tokenizer(self.prepare_prompt(doc), add_special_tokens=False)["input_ids"])


class EngineModel(LightevalModel):
    """A LightevalModel that samples each document once, under one evaluation seed, and journals what is finished.

    lighteval calls the method greedy_until; how tokens are picked is up to `sampling`.  Documents with given options
    are not sampled but scored, by `loglikelihood`.
    """

    def __init__(self, sampler: Sampler, prompts: ChatPrompts, seed: int, tally: Tally) -> None:
        sampling = sampler.sampling
        self._sampler = sampler
        self._prompts = prompts
        self._seed = seed
        self._tally = tally
        # Stands in for lighteval's cache, whose key lacks the weights and which is written only when all is finished.
        self._cache = SimpleNamespace(_init_registry=lambda registry: None)
        self.config = ModelConfig(
            model_name="checkpoint",
            generation_parameters=GenerationParameters(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_new_tokens=sampling.max_new_tokens,
                seed=seed,
            ),
        )

    @property
    def tokenizer(self) -> Any:
        return self._prompts.tokenizer

    @property
    def add_special_tokens(self) -> bool:
        return False

    @property
    def max_length(self) -> int:
        return int(self.tokenizer.model_max_length)

    def greedy_until(self, docs: list[Doc]) -> list[SampledResponse]:  # type: ignore[override]  # a list is invariant
        """Sample every document, taking from the journal what an earlier, killed run had finished."""
        ids = [specifics(doc)["id"] for doc in docs]
        requests = [
            Request(self._prompts.token_ids(doc), request_seed(self._seed, problem_id))
            for doc, problem_id in zip(docs, ids, strict=True)
        ]
        sampled = self._sampler.sample(requests, ids, self._tally)
        return [
            self._response(doc, request, *found) for doc, request, found in zip(docs, requests, sampled, strict=True)
        ]

    def _response(self, doc: Doc, request: Request, generation: Generation, resumed: bool) -> SampledResponse:
        stops = self._sampler.sampling.stop_token_ids
        return SampledResponse(
            input_tokens=list(request.prompt_ids),
            output_tokens=[list(generation.token_ids)],
            text=[response_text(self.tokenizer, generation.token_ids, stops)],
            finish_reason=generation.finish_reason,
            reasoning_opened=self._prompts.opens_reasoning(doc),
            details=specifics(doc)["details"],
            mean_logprob=generation.mean_logprob,
            seconds=generation.seconds,
            resumed=resumed,
        )

    def loglikelihood(self, docs: list[Doc]) -> list[SampledResponse]:  # type: ignore[override]  # as above
        """Choose an option of every document.  Nothing is journaled: a killed pass over given text starts again."""
        unfinished = [specifics(doc)["id"] for doc in docs]
        responses: list[SampledResponse] = []
        with self._sampler.watched(unfinished, self._tally) as watchdog:
            while unfinished:
                part = docs[len(responses) :][:DOCS_TOGETHER]
                responses += choose_options(self._sampler.engine, self.tokenizer, part)
                watchdog.alive()
                del unfinished[: len(part)]
                for _ in part:
                    self._tally.count()
        return responses

    def loglikelihood_rolling(self, docs: list[Doc]) -> Any:
        raise NotImplementedError("our tasks have answers or options")


def run_pipeline(task: LightevalTaskConfig, model: EngineModel, folder: Path) -> tuple[list[Any], dict[str, float]]:
    """Run lighteval's pipeline; its details per document (doc, model_response, metric), and its mean of each metric.

    lighteval's own results file is not written: it holds times and paths.
    """
    pipeline = Pipeline(
        tasks=f"{task.name}|0",
        pipeline_parameters=PipelineParameters(
            launcher_type=ParallelismManager.NONE,
            custom_tasks_directory=SimpleNamespace(TASKS_TABLE=[task]),  # type: ignore[arg-type]  # see measure 1
            remove_reasoning_tags=False,  # the grader reads the whole response
            bootstrap_iters=0,  # intervals are ours, over problems
        ),
        evaluation_tracker=EvaluationTracker(output_dir=str(folder), save_details=False),
        model=model,
    )
    pipeline.evaluate()
    means = pipeline.evaluation_tracker.metrics_logger.metric_aggregated[task.full_name]
    return pipeline.get_details()[task.full_name], means
