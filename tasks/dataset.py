"""The stage that brings a data set into the store: problems with answers and traces, or plain text."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, model_validator

from tasks.data import sources
from tasks.data.benchmark_rows import HUB, benchmark_digest, read_benchmark
from tasks.data.benchmarks import BenchmarkName
from tasks.data.bundled_problems import bundled_problems, bundled_stories
from tasks.data.fields import HUB_PRESETS, LICENCES, AnswerRule, Example, choose_fields, recognise, to_example
from tasks.runtime.stage import Context, Metrics, StageConfig, StageError, stage

BUNDLED, BUNDLED_STORIES = "bundled", "bundled_stories"
COLUMNS = pa.schema([(name, pa.string()) for name in ("id", "prompt", "response", "answer", "tier", "details")])
_FIELDS = ("prompt", "response", "answer", "reasoning", "text", "tier", "id")
_ROW_GROUP = 4096
_PROGRESS_EVERY = 1000


class DatasetConfig(StageConfig):
    location_fields: ClassVar[tuple[str, ...]] = ("source",)
    source: str = BUNDLED
    """"bundled" (problems), "bundled_stories" (plain text), a local .jsonl/.parquet/.csv/.txt file (.gz too) or folder,
    or a hub data set id.  For a benchmark: "hub", or a local folder with a copy named after it."""
    benchmark: BenchmarkName | None = None
    """A published benchmark, whose data sets, split, commit and columns are known."""
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    preset: Literal["openr1_math", "numinamath_1_5", "gsm8k", "math", "wikitext2", "traces"] | None = None
    """The columns of a well-known data set; chosen by the hub id where there is one."""
    prompt_field: str | None = None
    response_field: str | None = None
    answer_field: str | None = None
    answer_rule: AnswerRule | None = None
    """Where in answer_field the answer stands: all of it, after `####` ("hash"), or in the last \\boxed{}."""
    reasoning_field: str | None = None
    text_field: str | None = None
    tier_field: str | None = None
    id_field: str | None = None
    num_examples: int | None = Field(default=None, gt=0)
    """Drawn at random with `seed`, kept in the source's order; None takes all."""
    seed: int = Field(default=0, ge=0)
    tiers: tuple[str, ...] | None = None
    min_response_chars: int = Field(default=0, ge=0)
    max_response_chars: int | None = Field(default=None, gt=0)
    max_prompt_chars: int | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _benchmark_is_known(self) -> Self:
        if self.benchmark is None:
            return self
        if _is_bundled(self):
            raise ValueError(f'benchmark {self.benchmark} needs source: "{HUB}", or a folder with a copy of it')
        settled = ("subset", "split", "revision", "preset", "answer_rule", *(f"{name}_field" for name in _FIELDS))
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


@dataclass(frozen=True)
class _Source:
    examples: Iterable[Example | None]
    """None stands for a row that lacks what the fields ask for."""
    facts: dict[str, Any]


@stage(kind="dataset", source_digest=lambda config: source_digest(config))
def dataset(config: DatasetConfig, context: Context) -> Metrics:
    """Read, map, filter and sample; write data.parquet and dataset.json."""
    source = _open(config)
    counts = {"read": 0, "incomplete": 0, "filtered": 0}
    kept: list[Example] = []
    for example in source.examples:
        counts["read"] += 1
        if example is None:
            counts["incomplete"] += 1
        elif not _passes(example, config):
            counts["filtered"] += 1
        else:
            kept.append(example)
        if counts["read"] % _PROGRESS_EVERY == 0:
            context.progress(counts["read"], counts["read"], unit="row", kept=len(kept))
    chosen = _sample(kept, config, counts)
    _write(chosen, context.output / "data.parquet")
    counts["examples"] = len(chosen)
    description = {**source.facts, "seed": config.seed, "counts": counts}
    text = json.dumps(description, indent=2, sort_keys=True) + "\n"
    (context.output / "dataset.json").write_text(text, encoding="utf-8")
    context.progress(len(chosen), len(chosen), unit="row")
    return {**counts, "num_with_response": sum(bool(e.response) for e in chosen)}


def source_digest(config: DatasetConfig) -> str:
    """sha256 of what the stage will read from outside: contents of local files, names of anything else."""
    if config.benchmark is not None:
        return benchmark_digest(config.benchmark, config.source)
    if not _is_bundled(config) and sources.is_local(config.source):
        return sources.files_digest(sources.local_files(config.source, config.split))
    named = (config.source, config.subset, config.split, config.revision)
    return hashlib.sha256(json.dumps(named).encode()).hexdigest()


def _is_bundled(config: DatasetConfig) -> bool:
    return config.source in (BUNDLED, BUNDLED_STORIES)


def _open(config: DatasetConfig) -> _Source:
    if _is_bundled(config):
        return _bundled(config)
    if config.benchmark is not None:
        return _Source(*read_benchmark(config.benchmark, config.source))
    rows, facts, is_lines = _raw_rows(config)
    stream = iter(rows)
    first = next(stream, None)
    if first is None:
        raise StageError(f"data set {config.source} (split {config.split}) has no rows: give another file or split")
    preset = config.preset or HUB_PRESETS.get(config.source.lower()) or recognise(first)
    given = {name: getattr(config, f"{name}_field") for name in _FIELDS}
    fields = choose_fields(list(first), preset, given | {"answer_rule": config.answer_rule})
    rows = chain([first], stream)
    if fields.text is not None and preset == "wikitext2":
        rows = sources.articles(rows, fields.text)
    elif fields.text is not None and is_lines:
        rows = sources.paragraphs(rows, fields.text)
    facts["fields"] = {name: value for name, value in asdict(fields).items() if value}
    facts["licence"] = LICENCES.get(preset or "", "see the source")
    return _Source((to_example(row, fields, index) for index, row in enumerate(rows)), facts)


def _raw_rows(config: DatasetConfig) -> tuple[Iterable[Mapping[str, Any]], dict[str, Any], bool]:
    """(rows, where they come from, whether a row is a line of plain text) of a local or hub source."""
    if sources.is_local(config.source):
        files = sources.local_files(config.source, config.split)
        facts: dict[str, Any] = {
            "source": [file.name for file in files],
            "sha256": sources.files_digest(files),
            "split": config.split,
        }
        return sources.read_rows(files), facts, all(".txt" in file.suffixes for file in files)
    rows, commit = sources.hub_rows(config.source, config.subset, config.split, config.revision)
    facts = {"source": config.source, "subset": config.subset, "revision": commit, "split": config.split}
    return rows, facts, False


def _bundled(config: DatasetConfig) -> _Source:
    if config.num_examples is None:
        raise StageError(f"the {config.source} source is a generator without end: set num_examples")
    try:
        if config.source == BUNDLED:
            rows = bundled_problems(config.split, config.num_examples, config.seed, config.tiers)  # type: ignore[arg-type]
        else:
            rows = bundled_stories(config.split, config.num_examples, config.seed)  # type: ignore[arg-type]
    except ValueError as error:
        raise StageError(str(error)) from error
    facts = {"source": config.source, "split": config.split, "licence": "Apache-2.0"}
    return _Source((Example(**row) for row in rows), facts)


def _passes(example: Example, config: DatasetConfig) -> bool:
    longest_response = config.max_response_chars or len(example.response)
    longest_prompt = config.max_prompt_chars or len(example.prompt)
    return (
        config.min_response_chars <= len(example.response) <= longest_response
        and len(example.prompt) <= longest_prompt
        and (config.tiers is None or example.tier in config.tiers)
    )


def _sample(kept: list[Example], config: DatasetConfig, counts: Mapping[str, int]) -> list[Example]:
    """The examples the artifact holds; StageError if there are none, or fewer than asked for."""
    wanted = config.num_examples
    if not kept or (wanted is not None and len(kept) < wanted):
        raise StageError(
            f"data set {config.source}: {len(kept)} examples left of {counts['read']} rows ({counts['incomplete']} "
            f"lacked a prompt, response or answer, {counts['filtered']} were filtered out)"
            + (f", {wanted} asked for: lower num_examples, or loosen" if wanted else ": loosen")
            + " the filters (tiers, min_response_chars, max_response_chars, max_prompt_chars), or check the fields"
        )
    if wanted is None or wanted == len(kept):
        return kept
    indices = sorted(random.Random(config.seed).sample(range(len(kept)), wanted))
    return [kept[index] for index in indices]


def _write(examples: list[Example], path: Path) -> None:
    """Parquet in row groups, so that long traces need not be in memory twice."""
    rest = iter(examples)
    with pq.ParquetWriter(path, COLUMNS, compression="zstd") as writer:
        while rows := [asdict(example) for example in islice(rest, _ROW_GROUP)]:
            writer.write_table(pa.Table.from_pylist(rows, schema=COLUMNS))
