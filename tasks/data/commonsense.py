"""Rows of the commonsense benchmarks: for each option a context and the continuation whose probability is compared.

Zero-shot wording of EleutherAI/lm-evaluation-harness (lm_eval/tasks/{arc,hellaswag,piqa,winogrande}).  Rows may have
the columns published on the hub or those of mosaicml/llm-foundry's copies (scripts/eval/local_data).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from string import ascii_uppercase

from tasks.data.fields import Example, Row
from tasks.data.values import identity, words

ReadRow = Callable[[Row, int], Example]
"""(row, its number) -> example; KeyError, TypeError, ValueError or IndexError for a row of another form."""


def arc(row: Row, index: int) -> Example:
    """A science question; the options of ARC-Easy and ARC-Challenge are three to five."""
    if "query" in row:
        return _answers(row, index, words(row, "query"), row["choices"], row["gold"])
    options = row["choices"]
    gold = list(options["label"]).index(row["answerKey"])
    return _answers(row, index, f"Question: {words(row, 'question')}", options["text"], gold)


def piqa(row: Row, index: int) -> Example:
    """A goal and two ways to reach it."""
    if "query" in row:
        return _answers(row, index, words(row, "query"), row["choices"], row["gold"])
    return _answers(row, index, f"Question: {words(row, 'goal')}", (row["sol1"], row["sol2"]), row["label"])


def hellaswag(row: Row, index: int) -> Example:
    """A scene and four endings, without the marks that its WikiHow part brought along."""
    context = _clean(f"{words(row, 'activity_label')}: {words(row, 'ctx_a')} {words(row, 'ctx_b').capitalize()}")
    endings = [_clean(ending) for ending in row["endings"]]
    return _example(row, index, [context] * len(endings), endings, row["gold"] if "gold" in row else row["label"])


def winogrande(row: Row, index: int) -> Example:
    """A sentence with a gap: what follows the gap is scored after each of the two fillings."""
    if "context_options" in row:
        contexts, rest, gold = row["context_options"], row["continuation"], row["gold"]
    else:
        before, _, rest = words(row, "sentence").partition("_")
        contexts, gold = [before + row["option1"], before + row["option2"]], int(row["answer"]) - 1
    return _example(row, index, contexts, [rest.strip()] * len(contexts), gold)


def _answers(row: Row, index: int, question: str, options: Sequence[str], gold: int | str) -> Example:
    return _example(row, index, [f"{question}\nAnswer:"] * len(options), options, gold)


def _example(row: Row, index: int, contexts: Sequence[str], continuations: Sequence[str], gold: int | str) -> Example:
    """details: {"contexts": [...], "continuations": [...]}, one of each per option; answer: the right one's letter."""
    if not all(isinstance(text, str) and text for text in (*contexts, *continuations)):
        raise ValueError("an option is empty, or no text")
    if int(gold) != float(gold) or not 0 <= int(gold) < len(contexts):
        raise ValueError(f"the right option is number {gold} of {len(contexts)}")
    details = {"contexts": list(contexts), "continuations": [f" {text}" for text in continuations]}
    return Example(
        identity(row, "id", index),
        contexts[0],
        "",
        ascii_uppercase[int(gold)],
        "",
        json.dumps(details, ensure_ascii=False),
    )


def _clean(text: str) -> str:
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")
