"""The strict verifier of multiple-choice answers: a letter, after the last </think>."""

import re

from tasks.data.boxes import last_boxed
from tasks.judging.math_answer import Verdict

LETTERS = "ABCD"
# Longer boxes hold no letter, and need not be searched.
_MAX_BOX_CHARS = 100

# The wording that the prompt asks for (github.com/openai/simple-evals, common.py), with the emphasis models add.
_ANSWER_LINE = re.compile(r"(?i:answer)[*_]{0,2}\s{0,3}:\s{0,3}[*_($\\]{0,4}(?:boxed|text)?[{( ]{0,2}([A-D])\b")
_BOXED_LETTER = re.compile(r"(?:\\(?:text|textbf|mathrm|mathbf)\s?\{)?[\s({]*([A-D])\b")


def chosen_letter(answer_text: str) -> str | None:
    r"""The letter in the last \boxed{...}, else of the last line "Answer: X"; None without either.

    Linear in the text's length.
    """
    box = last_boxed(answer_text)
    if box is not None and len(box) <= _MAX_BOX_CHARS and (boxed := _BOXED_LETTER.match(box)):
        return boxed.group(1)
    letters = _ANSWER_LINE.findall(answer_text)
    return letters[-1] if letters else None


def grade_choice(answer_text: str | None, gold: str) -> Verdict:
    """Whether `answer_text`, a response without its reasoning (None if it has no end), chooses the letter `gold`."""
    letter = None if answer_text is None else chosen_letter(answer_text)
    return Verdict(correct=letter == gold, extracted=letter, timed_out=False)
