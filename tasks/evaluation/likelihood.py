"""Documents of given options as lighteval's responses, scored by an engine."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from string import ascii_uppercase
from typing import Any

from tasks.evaluation.lighteval_compat import Doc
from tasks.evaluation.lighteval_tasks import SampledResponse, specifics
from tasks.evaluation.options import Options
from tasks.sampling.engine import Engine, TokenPair

LOGPROB_DECIMALS = 4
"""Of a continuation's log-probability: what lies below is rounding, which depends on the batch."""


def choose_options(engine: Engine, tokenizer: Any, docs: Sequence[Doc]) -> list[SampledResponse]:
    """A response per document: its text is the letter of the chosen option, its tokens are that option's.

    details: {"logprobs": [...], "greedy": [...]}, each option's log-probability in nats, and whether greedy decoding
    would give it.
    """
    start = time.perf_counter()
    asked = [Options.parse(specifics(doc)["details"]) for doc in docs]
    pairs = [options.encode(tokenizer) for options in asked]
    scores = iter(engine.loglikelihood([pair for of_doc in pairs for pair in of_doc]))
    seconds = round(time.perf_counter() - start, 3)
    return [
        _response(options, of_doc, [next(scores) for _ in of_doc], seconds)
        for options, of_doc in zip(asked, pairs, strict=True)
    ]


def _response(
    options: Options, pairs: Sequence[TokenPair], scores: Sequence[tuple[float, bool]], seconds: float
) -> SampledResponse:
    logprobs, greedy = [logprob for logprob, _ in scores], [is_greedy for _, is_greedy in scores]
    chosen = options.most_probable(logprobs)
    context, continuation = pairs[chosen]
    rounded = [round(logprob, LOGPROB_DECIMALS) for logprob in logprobs]
    return SampledResponse(
        input_tokens=list(context),
        output_tokens=[list(continuation)],
        text=[ascii_uppercase[chosen]],
        logprobs=logprobs,
        argmax_logits_eq_gold=greedy,
        finish_reason="stop",
        details=json.dumps({"logprobs": rounded, "greedy": greedy}),
        seconds=seconds,
    )
