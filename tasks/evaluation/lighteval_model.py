"""Our engines as a lighteval model, and one run of lighteval's pipeline over it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tasks.data.prompts import render_prompt
from tasks.evaluation.benchmarks import SampledResponse, specifics
from tasks.evaluation.journal import Generation, Journal, request_key
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
from tasks.evaluation.tokens import request_seed, response_text
from tasks.rollout.engine import Completion, Engine, Request, SamplingParams


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

    def token_ids(self, doc: Doc) -> tuple[int, ...]:
        """Prompt tokens; the template writes the special tokens itself, so none is added (no double BOS)."""
        return tuple(self.tokenizer(self.prepare_prompt(doc), add_special_tokens=False)["input_ids"])


class EngineModel(LightevalModel):
    """A LightevalModel that samples each document once, under one evaluation seed, and journals what is finished.

    lighteval calls the method greedy_until; how tokens are picked is up to `sampling`.
    """

    def __init__(
        self,
        engine: Engine,
        prompts: ChatPrompts,
        sampling: SamplingParams,
        seed: int,
        journal: Journal,
        on_sample: Callable[[], None] = lambda: None,
    ) -> None:
        self._engine = engine
        self._prompts = prompts
        self._sampling = sampling
        self._seed = seed
        self._journal = journal
        self._on_sample = on_sample
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
        requests = [
            Request(self._prompts.token_ids(doc), request_seed(self._seed, specifics(doc)["id"])) for doc in docs
        ]
        keys = [request_key(request, self._sampling) for request in requests]
        pending = [index for index, key in enumerate(keys) if self._journal.get(key) is None]
        for _ in range(len(keys) - len(pending)):
            self._on_sample()

        def finished(index: int, completion: Completion) -> None:
            self._journal.append(keys[pending[index]], Generation(completion.token_ids, completion.finish_reason))
            self._on_sample()

        if pending:
            self._engine.generate([requests[index] for index in pending], self._sampling, finished)
        return [self._response(request, key) for request, key in zip(requests, keys, strict=True)]

    def _response(self, request: Request, key: str) -> SampledResponse:
        generation = self._journal.get(key)
        if generation is None:
            raise RuntimeError("the engine returned without reporting every completion as finished")
        return SampledResponse(
            input_tokens=list(request.prompt_ids),
            output_tokens=[list(generation.token_ids)],
            text=[response_text(self.tokenizer, generation.token_ids, self._sampling.stop_token_ids)],
            finish_reason=generation.finish_reason,
        )

    def loglikelihood(self, docs: list[Doc]) -> Any:
        raise NotImplementedError("engines only generate; use tasks scored by their answers")

    def loglikelihood_rolling(self, docs: list[Doc]) -> Any:
        raise NotImplementedError("engines only generate; use tasks scored by their answers")


def run_pipeline(task: LightevalTaskConfig, model: EngineModel, folder: Path) -> tuple[list[Any], float]:
    """Run lighteval's pipeline; its details per document (doc, model_response, metric), and its accuracy of the task.

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
    metrics = pipeline.evaluation_tracker.metrics_logger.metric_aggregated[task.full_name]
    return pipeline.get_details()[task.full_name], float(metrics["accuracy"])
