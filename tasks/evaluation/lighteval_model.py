"""Our engines as a lighteval model, and one run of lighteval's pipeline over it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tasks.data.prompts import THINK_OPEN, render_prompt
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
from tasks.sampling.engine import Completion, Engine, Request, SamplingParams
from tasks.sampling.journal import Generation, Journal, request_key
from tasks.sampling.tokens import request_seed, response_text
from tasks.sampling.watchdog import Watchdog

LOGPROB_DECIMALS = 4
"""Of a response's mean log-probability: what lies below is rounding, which depends on the batch."""
DOCS_TOGETHER = 256
"""Documents whose options are scored between two signs of life."""
MOST_NAMED = 8  # unfinished problems that the report of a stall names


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
        return self.prepare_prompt(doc).rstrip().endswith(THINK_OPEN)

    def token_ids(self, doc: Doc) -> tuple[int, ...]:
        """Prompt tokens; the template writes the special tokens itself, so none is added (no double BOS)."""
        return tuple(self.tokenizer(self.prepare_prompt(doc), add_special_tokens=False)["input_ids"])


class EngineModel(LightevalModel):
    """A LightevalModel that samples each document once, under one evaluation seed, and journals what is finished.

    lighteval calls the method greedy_until; how tokens are picked is up to `sampling`.  Documents with given options
    are not sampled but scored, by `loglikelihood`.
    """

    def __init__(
        self,
        engine: Engine,
        prompts: ChatPrompts,
        sampling: SamplingParams,
        seed: int,
        journal: Journal,
        identity: Mapping[str, str],
        watch: Callable[[Callable[[], str]], Watchdog],
        on_sample: Callable[[], None] = lambda: None,
    ) -> None:
        """`identity` says what computes the samples, see journal.request_key; `watch` makes a watchdog that tells
        which problems are not finished by calling its argument."""
        self._engine = engine
        self._identity = identity
        self._watch = watch
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
        keys = [request_key(request, self._sampling, self._identity) for request in requests]
        resumed = [self._journal.get(key) is not None for key in keys]
        pending = [index for index, was_finished in enumerate(resumed) if not was_finished]
        for _ in range(sum(resumed)):
            self._on_sample()
        if pending:
            self._generate(
                [requests[index] for index in pending],
                [keys[index] for index in pending],
                [specifics(docs[index])["id"] for index in pending],
            )
        return [self._response(*answered) for answered in zip(docs, requests, keys, resumed, strict=True)]

    def _generate(self, requests: Sequence[Request], keys: Sequence[str], problem_ids: Sequence[str]) -> None:
        """Have the engine complete the requests, each written to the journal under its key as it ends."""
        unfinished = dict(enumerate(problem_ids))
        start = time.perf_counter()

        def finished(index: int, completion: Completion) -> None:
            self._journal.append(keys[index], _generation(completion, time.perf_counter() - start))
            del unfinished[index]
            self._on_sample()

        with self._watch(lambda: self._describe(unfinished.values())) as watchdog:
            self._engine.generate(requests, self._sampling, finished, watchdog.alive)

    def _describe(self, unfinished: Collection[str]) -> str:
        named = [*islice(unfinished, MOST_NAMED)] + ["..."] * (len(unfinished) > MOST_NAMED)
        return f"{len(unfinished)} samples of seed {self._seed} (problems {', '.join(named)})"

    def _response(self, doc: Doc, request: Request, key: str, resumed: bool) -> SampledResponse:
        generation = self._journal.get(key)
        if generation is None:
            raise RuntimeError("the engine returned without reporting every completion as finished")
        return SampledResponse(
            input_tokens=list(request.prompt_ids),
            output_tokens=[list(generation.token_ids)],
            text=[response_text(self.tokenizer, generation.token_ids, self._sampling.stop_token_ids)],
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
        with self._watch(lambda: self._describe(unfinished)) as watchdog:
            while unfinished:
                part = docs[len(responses) :][:DOCS_TOGETHER]
                responses += choose_options(self._engine, self.tokenizer, part)
                watchdog.alive()
                del unfinished[: len(part)]
                for _ in part:
                    self._on_sample()
        return responses

    def loglikelihood_rolling(self, docs: list[Doc]) -> Any:
        raise NotImplementedError("our tasks have answers or options")


def _generation(completion: Completion, seconds: float) -> Generation:
    mean = sum(completion.logprobs) / len(completion.logprobs)
    known = None if math.isnan(mean) else round(mean, LOGPROB_DECIMALS)
    return Generation(completion.token_ids, completion.finish_reason, known, round(seconds, 3))


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
