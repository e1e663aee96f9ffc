"""What a user may say about a data set: the configuration of the dataset stage, light enough for every command."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import model_validator

from tasks.data.benchmarks import HUB, BenchmarkName
from tasks.data.fields import HUB_PRESETS, AnswerRule
from tasks.runtime.bounds import Count, Named, Seed, Whole
from tasks.runtime.stage import StageConfig

BUNDLED, BUNDLED_STORIES = "bundled", "bundled_stories"
FIELDS = ("prompt", "input", "response", "answer", "reasoning", "text", "tier", "id")
"""What columns can be; `NAME_field` names the column."""


class DatasetConfig(StageConfig):
    location_fields: ClassVar[tuple[str, ...]] = ("source", "revision")
    source: Named = BUNDLED
    """"bundled" (problems), "bundled_stories" (plain text), a local file (.jsonl, .json, .csv, .tsv, .txt, also packed;
    .parquet, .arrow), a folder of them or of `save_to_disk`, or a hub data set id.  For a benchmark: "hub", or a local
    folder with a copy named after it."""
    benchmark: BenchmarkName | None = None
    """A published benchmark, whose data sets, split, commit and columns are known."""
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    """Of a hub data set: a commit, or a branch or tag (None: the newest) whose commit the hub is asked for."""
    preset: Literal["openr1_math", "numinamath_1_5", "gsm8k", "math", "wikitext2", "traces"] | None = None
    """The columns of a well-known data set; chosen by the hub id where there is one."""
    prompt_field: str | None = None
    """Column of the problems; like the others, chosen by its usual name where unset, A.B for the field B of the objects
    in A, "" for none.  A column of conversations (messages) can be prompt_field, response_field or both."""
    input_field: str | None = None
    """What follows the problem, as alpaca's input."""
    response_field: str | None = None
    answer_field: str | None = None
    answer_rule: AnswerRule | None = None
    """Where in answer_field the answer stands: all of it, after `####` ("hash"), or in the last \\boxed{}."""
    reasoning_field: str | None = None
    text_field: str | None = None
    tier_field: str | None = None
    id_field: str | None = None
    num_examples: Count | None = None
    """Drawn at random with `seed`, kept in the source's order; None takes all."""
    seed: Seed = 0
    tiers: tuple[str, ...] | None = None
    min_response_chars: Whole = 0
    max_response_chars: Count | None = None
    max_prompt_chars: Count | None = None

    @property
    def is_bundled(self) -> bool:
        return self.source in (BUNDLED, BUNDLED_STORIES)

    @property
    def known_preset(self) -> str | None:
        """The preset that is named, or that a hub id of `source` stands for."""
        return self.preset or HUB_PRESETS.get(self.source.lower())

    def keyed(self) -> dict[str, Any]:
        """With the preset that `source` chooses: a content digest stands for `source`, and another name for the same
        content (a renamed data set, a local copy) may choose none.
        """
        return super().keyed() | {"preset": self.known_preset}

    @model_validator(mode="after")
    def _benchmark_is_known(self) -> Self:
        if self.benchmark is None:
            return self
        if self.is_bundled:
            raise ValueError(f'benchmark {self.benchmark} needs source: "{HUB}", or a folder with a copy of it')
        settled = ("subset", "split", "revision", "preset", "answer_rule", *(f"{name}_field" for name in FIELDS))
        if extra := [name for name in settled if getattr(self, name) != type(self).model_fields[name].default]:
            raise ValueError(f"benchmark {self.benchmark} settles {', '.join(extra)}: leave unset")
        return self

    @model_validator(mode="after")
    def _text_or_problems(self) -> Self:
        if self.text_field is not None and (self.prompt_field or self.response_field or self.reasoning_field):
            raise ValueError(
                "text_field makes plain text: leave prompt_field, response_field and reasoning_field unset"
            )
        if self.max_response_chars is not None and self.max_response_chars < self.min_response_chars:
            raise ValueError("max_response_chars is below min_response_chars: no response can pass")
        return self
