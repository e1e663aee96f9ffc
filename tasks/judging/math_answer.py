"""The math verifier that training rewards and evaluation share, and the paper's way of scoring beside it.

Strict: the last box after the last </think>; where there is no box, an answer that is stated as such.
The paper's harness: the last box of the whole response, and where there is none whatever looks like an answer.
"""

import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from tasks.data.boxes import last_boxed
from tasks.judging.equality import compare
from tasks.judging.grader import VerifierPool
from tasks.judging.math_worker import Kind

THINK_START, THINK_END = "<think>", "</think>"
# Longer answers are wrong: the longest of MATH's train split has 159, and parsing time grows fast with length.
MAX_ANSWER_CHARS = 1000
# Parsing time grows steeply with the depth; the deepest answer of MATH's train split has 3.
MAX_BRACKET_DEPTH = 20

_PERCENT_WORD = re.compile(r"%|percent|pct", re.IGNORECASE)
# Fifteen digits are exact in double precision.
_INTEGER = re.compile(r"-?[0-9]{1,15}")
_INTEGER_BOX = re.compile(r"\\boxed\{(-?[0-9]{1,15})\}")

# Of values that algebra compares for one answer; where more would be needed, it is not known whether it is right.
_MOST_QUESTIONS = 400


@dataclass(frozen=True)
class Verdict:
    """`timed_out`: the comparison took too long or crashed its process; it counts as incorrect."""

    correct: bool
    extracted: str | None
    timed_out: bool


def answer_part(text: str, reasoning_opened: bool = True) -> str | None:
    """What follows the last </think>; None for a response that was cut off while reasoning.

    Args:
        text: the response.
        reasoning_opened: whether the prompt ends inside the reasoning. Where it does not, a response without <think>
            and </think> has no reasoning and is all answer.
    """
    _, tag, part = text.rpartition(THINK_END)
    return None if not tag and (reasoning_opened or THINK_START in text) else part


def quick_verdict(gold: str, answer: str) -> bool | None:
    """Decide what needs no algebra: other structure, plain numbers, equal strings, hopeless answers; else None."""
    return False if is_hopeless(gold, answer) else compare(gold, answer, lambda *_: None)


def is_hopeless(gold: str, answer: str) -> bool:
    """Whether an answer is too long, too deep or too big a number to be looked at."""
    if len(answer) > MAX_ANSWER_CHARS or bracket_depth(answer) > MAX_BRACKET_DEPTH:
        return True
    return has_nested_power(answer) and not has_nested_power(gold)


def quick_published_verdict(gold: str, response: str) -> bool | None:
    """The paper's verdict where it is plain: an integer to find, and an integer in the only box; else None.

    The harness reads \\fbox as a box and a percent sign after it, and prefers "final answer is ... I hope" to a box.
    """
    if response.count("\\boxed") != 1 or _INTEGER.fullmatch(gold) is None:
        return None
    box = _INTEGER_BOX.search(response)
    if box is None or "\\fbox" in response or "I hope" in response or _PERCENT_WORD.search(response, box.end()):
        return None
    return int(gold) == int(box.group(1))


def has_nested_power(answer: str) -> bool:
    """Whether an exponent holds or meets another power: 5^(5^5), 5^{5^{5}}, 5^5^5. Such numbers are endless."""
    answer = answer.replace("**", "^")
    starts = [match.end() for match in re.finditer(r"\^", answer)]
    return any("^" in answer[start : _exponent_end(answer, start) + 1] for start in starts)


def bracket_depth(answer: str) -> int:
    """How deep brackets of any kind are nested."""
    depth = deepest = 0
    for char in answer:
        depth += (char in "({[") - (char in ")}]")
        deepest = max(deepest, depth)
    return deepest


def _exponent_end(answer: str, start: int) -> int:
    """Where the exponent that begins at `start` ends: after its bracket, its digits or its one symbol."""
    depth = 0
    for end in range(start, len(answer)):
        depth += (answer[end] in "({[") - (answer[end] in ")}]")
        if depth <= 0 and not answer[end : end + 2].isdigit():
            return end + 1
    return len(answer)


def _questions(gold: str, answer: str) -> list[tuple[str, str]]:
    """The values whose equality decides, and which algebra must compare."""
    asked: dict[tuple[str, str], None] = {}

    def note(left: str, right: str) -> None:
        asked[left, right] = None

    compare(gold, answer, note)
    return list(asked)


class Grader(AbstractContextManager["Grader"]):
    """Grades responses against reference answers; use as a context manager.

    Args:
        num_workers: processes for symbolic comparison; started only when a comparison needs them.
        cpu_seconds: processor time of one comparison.
    """

    def __init__(self, num_workers: int = 2, cpu_seconds: float = 5.0) -> None:
        self._pool = VerifierPool(num_workers, cpu_seconds)

    def __exit__(self, *_: object) -> None:
        self.close()

    def grade_answers(self, extracted: Sequence[str | None], answers: Sequence[str]) -> list[Verdict]:
        """A verdict for each extracted answer, None where there is none, against the reference answer beside it."""
        pairs = list(zip(answers, extracted, strict=True))
        decided: dict[tuple[str, str | None], bool | None] = {
            (gold, answer): False if answer is None else quick_verdict(gold, answer) for gold, answer in pairs
        }
        open_pairs = [(gold, answer) for (gold, answer), verdict in decided.items() if verdict is None and answer]
        questions = [_questions(*pair)[:_MOST_QUESTIONS] for pair in open_pairs]
        for pair, asked, replies in zip(open_pairs, questions, self._pool.verify_together(questions), strict=True):
            known = {} if replies is None else dict(zip(asked, replies, strict=True))
            decided[pair] = compare(*pair, lambda *question: known.get(question))  # noqa: B023
        return [
            Verdict(correct=decided[pair] is True, extracted=pair[1], timed_out=decided[pair] is None) for pair in pairs
        ]

    def grade_parts(self, parts: Sequence[str | None], answers: Sequence[str]) -> list[Verdict]:
        """Verdicts on answer parts: the last box, else what the text states as its answer ("the answer is ...").

        None stands for a response without answer part, which is wrong.
        """
        boxes = [None if part is None else last_boxed(part) for part in parts]
        verdicts = self.grade_answers(boxes, answers)
        unboxed = {i: part for i, part in enumerate(parts) if part is not None and boxes[i] is None}
        stating = {i: part for i, part in unboxed.items() if "answer" in part.lower()}
        golds = [answers[i] for i in stating]
        found = self._grade_texts("statement", list(zip(golds, stating.values(), strict=True)))
        stated = self.grade_answers([verdict.extracted for verdict in found], golds)
        for i, extraction, verdict in zip(stating, found, stated, strict=True):
            verdicts[i] = extraction if extraction.timed_out else verdict
        return verdicts

    def grade_published(self, responses: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        """Verdicts as the paper's harness gives them: extraction from the whole response, boxed first.

        A response that was cut off is graded like any other, and a box in the reasoning counts
        (ruikangliu/Quantized-Reasoning-Models, lighteval_custom/tasks/reasoning.py).
        """
        pairs = list(zip(answers, responses, strict=True))
        quick = [quick_published_verdict(*pair) for pair in pairs]
        slow = iter(self._grade_texts("response", [p for p, plain in zip(pairs, quick, strict=True) if plain is None]))
        return [
            next(slow) if plain is None else Verdict(plain, last_boxed(response), timed_out=False)
            for plain, response in zip(quick, responses, strict=True)
        ]

    def _grade_texts(self, kind: Kind, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        """Verdicts on (gold, text), with the answer that math-verify finds in the text; equal pairs are graded once."""
        distinct = list(dict.fromkeys(pairs))
        replies = self._pool.run([(kind, gold, text) for gold, text in distinct])
        verdicts = {
            pair: Verdict(False, None, timed_out=True) if reply is None else Verdict(*reply, timed_out=False)
            for pair, reply in zip(distinct, replies, strict=True)
        }
        return [verdicts[pair] for pair in pairs]

    def close(self) -> None:
        """End the worker processes."""
        self._pool.close()
