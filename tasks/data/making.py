"""Making a dataset artifact: reading, mapping, filtering, sampling, writing."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tasks.data import sources
from tasks.data.benchmark_rows import read_benchmark
from tasks.data.bundled_problems import bundled_problems, bundled_stories
from tasks.data.config import BUNDLED, FIELDS, DatasetConfig
from tasks.data.fields import HUB_PRESETS, LICENCES, Example, choose_fields, recognise, to_example
from tasks.runtime.stage import Context, Metrics, StageError

COLUMNS = pa.schema([(name, pa.string()) for name in ("id", "prompt", "response", "answer", "tier", "details")])
_ROW_GROUP = 4096
_PROGRESS_EVERY = 1000


@dataclass(frozen=True)
class _Source:
    examples: Iterable[Example | None]
    """None stands for a row that lacks what the fields ask for."""
    facts: dict[str, Any]


def make_dataset(config: DatasetConfig, context: Context) -> Metrics:
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


def _open(config: DatasetConfig) -> _Source:
    if config.is_bundled:
        return _bundled(config)
    if config.benchmark is not None:
        return _Source(*read_benchmark(config.benchmark, config.source))
    rows, facts, is_lines = _raw_rows(config)
    stream = iter(rows)
    first = next(stream, None)
    if first is None:
        raise StageError(f"data set {config.source} (split {config.split}) has no rows: give another file or split")
    preset = config.preset or HUB_PRESETS.get(config.source.lower()) or recognise(first)
    given = {name: getattr(config, f"{name}_field") for name in FIELDS}
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
