"""An answer of a model, with all that a judge must know of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tasks.judging.math_answer import answer_part

JudgedKind = Literal["math", "choice", "code"]
"""Kinds of task whose responses are sampled, see tasks.data.benchmarks.TaskKind."""
PACKAGES: dict[str, tuple[str, ...]] = {"math": ("math-verify",), "code": ("python", "numpy")}
"""What decides verdicts by its version, for each kind: of programs, what runs them and what they may import."""


@dataclass(frozen=True)
class Response:
    text: str
    """Without the stop token."""
    truncated: bool
    """Cut off at the token limit."""
    reasoning_opened: bool
    """By the prompt, which ends inside the reasoning, as that of DeepSeek-R1's template does."""

    @property
    def answer_part(self) -> str | None:
        """The text that is judged, after the reasoning; None where there is none."""
        return None if self.truncated else answer_part(self.text, self.reasoning_opened)
