"""The problems of a published benchmark, from the hub or from a local copy."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from tasks.data import sources
from tasks.data.benchmarks import BENCHMARKS, HUB, BenchmarkName, HubDataset, RowForm
from tasks.data.commonsense import ReadRow
from tasks.data.fields import Example, FieldMap, Row
from tasks.data.files import format_of
from tasks.data.hub import commit_of, hub_table
from tasks.data.mapping import to_example
from tasks.data.values import Dropped
from tasks.data.wording import first_line, listed, shorten
from tasks.runtime.stage import StageError


def read_benchmark(name: BenchmarkName, source: str) -> tuple[list[Example], dict[str, Any]]:
    """(examples, facts for dataset.json) from HUB or from a folder with a copy.

    Examples come in the published order; ids are the published ones, else running numbers.

    Raises:
        StageError: no data, naming data set, commit and how to provide a copy; missing columns; an incomplete row; more
            rows than the benchmark has.
    """
    benchmark = BENCHMARKS[name]
    facts: dict[str, Any] = {"benchmark": name, "published": benchmark.num_problems, "licence": benchmark.licence}
    examples: list[Example] = []
    if source == HUB:
        facts["datasets"] = []
        for dataset in benchmark.datasets:
            commit = _commit(name, dataset)
            table = hub_table(dataset.source, dataset.subset, dataset.split, commit, _hub_remedy(name))
            part = _examples(table.rows(), name, start=len(examples))
            examples += [replace(example, tier=dataset.tier or example.tier) for example in part]
            facts["datasets"].append({**asdict(dataset), "revision": commit})
    else:
        files = local_copy(name, source)
        examples += _examples(sources.read_rows(files), name, start=0)
        facts |= {"source": [file.name for file in files], "sha256": sources.files_digest(files)}
    if len(examples) > benchmark.num_problems:
        raise StageError(
            f"benchmark {name}: {len(examples)} rows, but it has {benchmark.num_problems} problems: keep only the "
            "files of the published split"
        )
    return examples, facts


def benchmark_digest(name: BenchmarkName, source: str) -> str:
    """sha256 of what `read_benchmark` will read: contents of a local copy, or names and commits on the hub."""
    if source != HUB:
        return sources.files_digest(local_copy(name, source))
    named = [{**asdict(dataset), "revision": _commit(name, dataset)} for dataset in BENCHMARKS[name].datasets]
    return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()


def local_copy(name: BenchmarkName, folder: str) -> list[Path]:
    """The files of a copy: FOLDER/NAME as a file that `files.py` reads, or all data files in FOLDER/NAME/.

    Raises StageError when there is none, or more than one.
    """
    root = Path(folder).expanduser()
    found = sorted(path for path in root.glob(f"{name}*") if path.name == name or _is_copy(path, name))
    if not found:
        raise StageError(f"{shorten(folder, 60)} has no copy of benchmark {name}: {how_to_provide(name)}")
    if len(found) > 1:
        names = " and ".join(path.name for path in found)
        raise StageError(f"{shorten(folder, 60)} has several copies of benchmark {name}, {names}: keep one of them")
    return sources.local_files(str(found[0]), "all")


def _is_copy(path: Path, name: BenchmarkName) -> bool:
    return path.name.startswith(f"{name}.") and format_of(path) is not None


def how_to_provide(name: BenchmarkName) -> str:
    """The remedy for missing data."""
    benchmark = BENCHMARKS[name]
    published = " and ".join(f"{d.source} ({_place(d)})" for d in benchmark.datasets)
    columns = listed(_required(benchmark.fields), 32)
    return f"put {name}.jsonl with {columns} of {published} into a folder, set benchmark_data to it"


def _place(dataset: HubDataset) -> str:
    return f"{dataset.subset or dataset.split}, revision {(dataset.revision or 'newest')[:7]}"


def _hub_remedy(name: BenchmarkName) -> str:
    access = BENCHMARKS[name].access or "check the network"
    return f"{access}; or put {name}.jsonl into a folder and give it as benchmark_data"


def _commit(name: BenchmarkName, dataset: HubDataset) -> str:
    return commit_of(dataset.source, dataset.revision, _hub_remedy(name))


def _examples(rows: Iterable[Row], name: BenchmarkName, start: int) -> list[Example]:
    rows = list(rows)
    if not rows:
        raise StageError(f"benchmark {name}: the data has no rows; {how_to_provide(name)}")
    fields = BENCHMARKS[name].fields
    read: ReadRow
    if isinstance(fields, RowForm):
        read = partial(_read_form, name, fields)
    else:
        columns = list(dict.fromkeys(column for row in rows for column in row))
        read = partial(_read_columns, name, _present_fields(name, fields, columns))
    return [read(row, index) for index, row in enumerate(rows, start)]


def _read_columns(name: BenchmarkName, fields: FieldMap, row: Row, index: int) -> Example:
    try:
        example = to_example(row, fields, index)
    except StageError as error:
        raise StageError(f"benchmark {name}: row {index}: {error}") from error
    if isinstance(example, Dropped):
        raise StageError(
            f"benchmark {name}: row {index} lacks one of {', '.join(_required(fields))}, or has it in another form "
            f"({example.reason}): complete the copy"
        )
    return example


def _read_form(name: BenchmarkName, form: RowForm, row: Row, index: int) -> Example:
    try:
        example = form.read(row, index)
        "".join(asdict(example).values()).encode()  # a half surrogate is no text
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise StageError(
            f"benchmark {name}: row {index} cannot be read ({first_line(error, 60)}); {how_to_provide(name)}"
        ) from error
    return example


def _present_fields(name: BenchmarkName, fields: FieldMap, columns: Sequence[str]) -> FieldMap:
    """The benchmark's fields without an id or tier column that is not there."""
    if missing := [column for column in _required(fields) if column not in columns]:
        raise StageError(
            f"benchmark {name}: no column {listed(missing, 32)} (columns: {listed(columns, 32)}); "
            f"{how_to_provide(name)}"
        )
    return replace(
        fields,
        id=fields.id if fields.id in columns else None,
        tier=fields.tier if fields.tier in columns else None,
    )


def _required(fields: FieldMap | RowForm) -> list[str]:
    if isinstance(fields, RowForm):
        return list(fields.columns)
    return [column for column in dict.fromkeys((fields.prompt, fields.answer, *fields.choices)) if column]
