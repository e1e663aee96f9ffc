"""Multiple choice without sampling: the option is taken whose continuation is most probable per character.

That is acc_norm of EleutherAI/lm-evaluation-harness (lm_eval/api/task.py), and acc where all continuations have the
same length.  Context and continuation are tokenized together and parted where the context's own tokens end, with the
tokenizer's special tokens in front and no chat template, as in lighteval (models/abstract_model.py, tok_encode_pair).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any, Self

from tasks.judging.questions import Problem, Question
from tasks.runtime.stage import StageError
from tasks.sampling.engine import TokenPair


@dataclass(frozen=True)
class Options:
    """A context and a continuation for each option."""

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]

    @classmethod
    def parse(cls, details: str) -> Self:
        """From a problem's details; ValueError where they are of another form."""
        try:
            fields = json.loads(details)
            options = cls(tuple(fields["contexts"]), tuple(fields["continuations"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"details hold no contexts and continuations ({type(error).__name__}: {error})") from None
        if not 2 <= len(options.contexts) == len(options.continuations) <= len(ascii_uppercase):
            raise ValueError(f"{len(options.contexts)} contexts and {len(options.continuations)} continuations")
        if not all(context.strip() for context in options.contexts) or not all(options.continuations):
            raise ValueError("a context or a continuation is empty")
        return options

    def encode(self, tokenizer: Any) -> list[TokenPair]:
        """Tokens of each option's context and continuation."""
        return [encode_pair(tokenizer, *option) for option in zip(self.contexts, self.continuations, strict=True)]

    def most_probable(self, logprobs: Sequence[float]) -> int:
        """The option with the highest log-probability per character; the space that parts it from its context is none.

        The first of equal ones.
        """
        lengths = [len(text.removeprefix(" ")) for text in self.continuations]
        return max(range(len(lengths)), key=lambda option: logprobs[option] / lengths[option])


def ask_options(problem: Problem) -> Question:
    """The question whose details are the contexts and continuations to be scored.  StageError if there are none."""
    try:
        Options.parse(problem.details)
    except ValueError as error:
        raise StageError(
            f"problem {problem.id!r}: {error}; evaluate it as another kind, or give a data set whose details column "
            "holds one of each per option"
        ) from error
    return Question(problem.id, problem.prompt, problem.answer, problem.tier, problem.details)


def encode_pair(tokenizer: Any, context: str, continuation: str) -> TokenPair:
    """Tokens of context + continuation, parted after as many as the context has by itself.

    White space at the end of the context goes to the continuation, whose first token mostly includes it.
    """
    together = tuple(tokenizer(context + continuation, verbose=False)["input_ids"])
    num_context = len(tokenizer(context.rstrip(), verbose=False)["input_ids"])
    num_context = min(num_context, len(together) - 1)
    return together[:num_context], together[num_context:]
