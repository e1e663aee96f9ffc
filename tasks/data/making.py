"""Making a dataset artifact: reading, mapping, filtering, sampling, writing."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tasks.data import sources
from tasks.data.benchmark_rows import benchmark_digest, read_benchmark
from tasks.data.bundled_problems import bundled_problems, bundled_stories
from tasks.data.config import BUNDLED, FIELDS, DatasetConfig
from tasks.data.fields import LICENCES, Example, FieldMap, Row, choose_fields, described, recognise
from tasks.data.files import is_plain_text
from tasks.data.hub import commit_of, hub_table
from tasks.data.mapping import to_example
from tasks.data.tables import Columns, Files, Table
from tasks.data.values import Dropped, Note
from tasks.data.wording import MOST_CHARS, listed, shorten
from tasks.runtime.stage import Context, Metrics, StageError

MOST_ROWS = 20_000_000
"""What is read is held in memory; more rows than this are a mistake, or a bomb."""
COLUMNS = pa.schema([(name, pa.string()) for name in ("id", "prompt", "response", "answer", "tier", "details")])
_ROW_GROUP = 4096
_PROGRESS_EVERY = 1000
_HINTS = {
    "no_response": "check response_field",
    "no_answer": "check answer_field and answer_rule",
    "no_reasoning": "check reasoning_field",
    "several_values": "name columns of one value per row",
    "no_assistant_turn": 'set response_field: "" if problems are all you want',
    "multi_turn": "split the conversations into single questions",
}


@dataclass(frozen=True)
class _Source:
    examples: Iterable[Example | Dropped]
    facts: dict[str, Any]
    notes: Counter[Note] = field(default_factory=Counter)
    """What was changed in rows, counted while `examples` is read."""
    digest: Callable[[], str] | None = None
    """Digests the source once more; None for what cannot change, a commit of the hub's."""


@dataclass
class _Counts:
    """What became of the rows that were read."""

    read: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    """By `values.Reason`."""
    filtered: Counter[str] = field(default_factory=Counter)
    """By the option that filtered them out."""

    @property
    def totals(self) -> dict[str, int]:
        return {"read": self.read, "incomplete": self.dropped.total(), "filtered": self.filtered.total()}


def make_dataset(config: DatasetConfig, context: Context) -> Metrics:
    """Read, map, filter and sample; write data.parquet and dataset.json.

    Nothing is left out in silence: dataset.json and the metrics count the rows that were dropped, by reason, and those
    that were changed; dataset.json names the columns that were not used.
    """
    source = _open(config, context.source_digest)
    counts = _Counts()
    kept: list[Example] = []
    for example in source.examples:
        counts.read += 1
        if isinstance(example, Dropped):
            counts.dropped[example.reason] += 1
        elif option := _filtered_by(example, config):
            counts.filtered[option] += 1
        else:
            kept.append(example)
        if counts.read % _PROGRESS_EVERY == 0:
            context.progress(counts.read, counts.read, unit="row", kept=len(kept))
            if counts.read > MOST_ROWS:
                raise StageError(f"data set {shorten(config.source)}: more than {MOST_ROWS:,} rows: give a part of it")
    if source.digest is not None and context.source_digest not in (None, source.digest()):
        raise StageError(
            f"data set {shorten(config.source)} changed since the run began, so its examples would stand under the old "
            "content's key: run the same command again"
        )
    chosen = _sample(kept, config, counts)
    _write(chosen, context.output / "data.parquet")
    totals = counts.totals | {"examples": len(chosen)}
    description = {
        **source.facts,
        "seed": config.seed,
        "counts": totals,
        "dropped": dict(counts.dropped),
        "filtered_by": dict(counts.filtered),
        "changed": dict(source.notes),
    }
    text = json.dumps(description, indent=2, sort_keys=True) + "\n"
    (context.output / "dataset.json").write_text(text, encoding="utf-8")
    context.progress(len(chosen), len(chosen), unit="row")
    for text in _remarks(source, counts):
        context.note(text)
    reasons = {f"dropped_{reason}": num for reason, num in sorted(counts.dropped.items())}
    with_response = sum(bool(example.response) for example in chosen)
    return {**totals, "num_with_response": with_response, **reasons, **dict(sorted(source.notes.items()))}


def _open(config: DatasetConfig, promised: str | None) -> _Source:
    """`promised`: `source_digest` as the key has it."""
    if config.is_bundled:
        return _bundled(config)
    if config.benchmark is not None:
        examples, facts = read_benchmark(config.benchmark, config.source)
        return _Source(examples, facts, digest=partial(benchmark_digest, config.benchmark, config.source))
    table, facts, is_lines, digest = _table(config, promised)
    columns = table.columns()
    if not columns:
        raise StageError(
            f"data set {shorten(config.source)} (split {shorten(config.split, 40)}) has no rows: give another file or "
            "split"
        )
    preset = config.known_preset or _recognised(columns)
    kinds = {name: column.kind for name, column in columns.items()}
    given = {name: getattr(config, f"{name}_field") for name in FIELDS}
    fields = choose_fields(kinds, preset, given | {"answer_rule": config.answer_rule})
    used = fields.columns(kinds)
    rows: Iterable[Row] = table.rows(used)
    if fields.text is not None and preset == "wikitext2":
        rows = sources.articles(rows, fields.text)
    elif fields.text is not None and is_lines:
        rows = sources.paragraphs(rows, fields.text)
    facts["fields"] = {name: value for name, value in asdict(fields).items() if value}
    facts["columns_unused"] = sorted(set(kinds) - set(used))
    facts["licence"] = LICENCES.get(preset or "", "see the source")
    notes: Counter[Note] = Counter()
    return _Source(_examples(rows, table, fields, kinds, notes), facts, notes, digest)


def _remarks(source: _Source, counts: _Counts) -> Iterator[str]:
    """What was left out, in the words of a note."""
    if counts.dropped:
        reasons = ", ".join(f"{num} as {reason}" for reason, num in counts.dropped.most_common())
        yield shorten(f"{counts.dropped.total()} of {counts.read} rows dropped: {reasons}", MOST_CHARS)
    for changed, num in sorted(source.notes.items()):
        yield f"{changed.replace('_', ' ')} in {num} rows"
    fields, unused = source.facts.get("fields", {}), source.facts.get("columns_unused")
    if unused and not fields.get("response") and not fields.get("text"):
        yield f"no column known for responses; not used: {listed(unused)}; set response_field if one of them is it"


def _recognised(columns: Columns) -> str | None:
    return recognise({name: column.first for name, column in columns.items()})


def _examples(
    rows: Iterable[Row], table: Table, fields: FieldMap, kinds: Mapping[str, str], notes: Counter[Note]
) -> Iterator[Example | Dropped]:
    for index, row in enumerate(rows):
        changed: set[Note] = set()
        try:
            example = to_example(row, fields, index, changed)
        except StageError as error:
            raise StageError(shorten(f"{table.place}: {error} ({described(kinds)})", MOST_CHARS)) from error
        if isinstance(example, Example):
            notes.update(changed)
        yield example


def _table(config: DatasetConfig, promised: str | None) -> tuple[Table, dict[str, Any], bool, Callable[[], str] | None]:
    """(rows, where they come from, whether a row is a line of plain text, digest) of a local or hub source."""
    if sources.is_local(config.source):
        files = sources.local_files(config.source, config.split, config.subset)
        facts: dict[str, Any] = {
            "source": [file.name for file in files],
            "sha256": sources.files_digest(files),
            "split": config.split,
        }
        return Files(files), facts, all(is_plain_text(file) for file in files), partial(sources.files_digest, files)
    commit = promised or commit_of(config.source, config.revision)
    facts = {"source": config.source, "subset": config.subset, "revision": commit, "split": config.split}
    return hub_table(config.source, config.subset, config.split, commit), facts, False, None


def _bundled(config: DatasetConfig) -> _Source:
    if config.num_examples is None:
        raise StageError(f"the {config.source} source is a generator without end: set num_examples")
    try:
        if config.source == BUNDLED:
            rows = bundled_problems(config.split, config.num_examples, config.seed, config.tiers)  # type: ignore[arg-type]
        else:
            rows = bundled_stories(config.split, config.num_examples, config.seed)  # type: ignore[arg-type]
    except ValueError as error:
        raise StageError(shorten(error, MOST_CHARS)) from error
    facts = {"source": config.source, "split": config.split, "licence": "Apache-2.0"}
    return _Source((Example(**row) for row in rows), facts)


def _filtered_by(example: Example, config: DatasetConfig) -> str:
    """The option that an example does not pass; "" where it passes all."""
    if len(example.response) < config.min_response_chars:
        return "min_response_chars"
    if config.max_response_chars is not None and len(example.response) > config.max_response_chars:
        return "max_response_chars"
    if config.max_prompt_chars is not None and len(example.prompt) > config.max_prompt_chars:
        return "max_prompt_chars"
    return "" if config.tiers is None or example.tier in config.tiers else "tiers"


def _sample(kept: list[Example], config: DatasetConfig, counts: _Counts) -> list[Example]:
    """The examples the artifact holds; StageError if there are none, or fewer than asked for."""
    wanted = config.num_examples
    if not kept or (wanted is not None and len(kept) < wanted):
        raise StageError(_too_few(len(kept), config, counts))
    if wanted is None or wanted == len(kept):
        return kept
    indices = sorted(random.Random(config.seed).sample(range(len(kept)), wanted))
    return [kept[index] for index in indices]


def _too_few(num: int, config: DatasetConfig, counts: _Counts) -> str:
    lost = [f"{n} dropped as {reason}" for reason, n in counts.dropped.most_common(3)]
    lost += [f"{n} were filtered out by {option}" for option, n in counts.filtered.most_common(2)]
    remedies = ["lower num_examples"] if config.num_examples is not None and num else []
    remedies += [_HINTS.get(reason, "check the fields") for reason, _ in counts.dropped.most_common(1)]
    remedies += ["loosen the filters"] if counts.filtered else []
    return shorten(
        f"data set {shorten(config.source, 60)}: {num} examples left of {counts.read} rows"
        + (f" ({', '.join(lost)})" if lost else "")
        + (f", {config.num_examples} asked for" if config.num_examples is not None else "")
        + f": {', or '.join(remedies) or 'give more data'}",
        MOST_CHARS,
    )


def _write(examples: list[Example], path: Path) -> None:
    """Parquet in row groups, so that long traces need not be in memory twice."""
    rest = iter(examples)
    with pq.ParquetWriter(path, COLUMNS, compression="zstd") as writer:
        while rows := [asdict(example) for example in islice(rest, _ROW_GROUP)]:
            writer.write_table(pa.Table.from_pylist(rows, schema=COLUMNS))
