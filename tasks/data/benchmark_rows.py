"""The problems of a published benchmark, from the hub or from a local copy."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from tasks.data import sources
from tasks.data.benchmarks import BENCHMARKS, HUB, BenchmarkName, HubDataset, RowForm
from tasks.data.commonsense import ReadRow
from tasks.data.fields import Example, FieldMap, Row, to_example
from tasks.runtime.stage import StageError

COPY_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet", ".csv")


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
            rows, commit = _hub_rows(name, dataset)
            part = _examples(rows, name, start=len(examples))
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
    named = [asdict(dataset) for dataset in BENCHMARKS[name].datasets]
    return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()


def local_copy(name: BenchmarkName, folder: str) -> list[Path]:
    """The files of a copy: FOLDER/NAME with one of COPY_SUFFIXES, or all data files in FOLDER/NAME/.

    Raises StageError when there is none, or more than one.
    """
    root = Path(folder).expanduser()
    candidates = (root / f"{name}{suffix}" for suffix in ("", *COPY_SUFFIXES))
    found = [path for path in candidates if path.exists()]
    if not found:
        raise StageError(f"{folder} has no copy of benchmark {name}: {how_to_provide(name)}")
    if len(found) > 1:
        names = " and ".join(path.name for path in found)
        raise StageError(f"{folder} has several copies of benchmark {name}, {names}: keep one of them")
    return sources.local_files(str(found[0]), "all")


def how_to_provide(name: BenchmarkName) -> str:
    """The remedy for missing data."""
    benchmark = BENCHMARKS[name]
    published = " and ".join(f"{d.source} ({_place(d)})" for d in benchmark.datasets)
    return (
        f"put {name}.jsonl (or {', '.join(COPY_SUFFIXES[1:])}, or a folder {name} of such files) with the columns "
        f"{', '.join(_required(benchmark.fields))} of {published} into a folder, and set benchmark_data to that folder"
    )


def _place(dataset: HubDataset) -> str:
    subset = f"subset {dataset.subset}, " if dataset.subset else ""
    return f"{subset}split {dataset.split}, revision {dataset.revision or 'newest'}"


def _hub_rows(name: BenchmarkName, dataset: HubDataset) -> tuple[Iterable[Row], str | None]:
    benchmark = BENCHMARKS[name]
    access = f"{benchmark.access}; or " if benchmark.access else "check the network; or "
    remedy = f"{access}{how_to_provide(name)}"
    return sources.hub_rows(dataset.source, dataset.subset, dataset.split, dataset.revision, remedy)


def _examples(rows: Iterable[Row], name: BenchmarkName, start: int) -> list[Example]:
    stream = iter(rows)
    first = next(stream, None)
    if first is None:
        raise StageError(f"benchmark {name}: the data has no rows; {how_to_provide(name)}")
    fields = BENCHMARKS[name].fields
    read: ReadRow
    if isinstance(fields, RowForm):
        read = partial(_read_form, name, fields)
    else:
        read = partial(_read_columns, name, _present_fields(name, fields, list(first)))
    return [read(row, index) for index, row in enumerate(chain([first], stream), start)]


def _read_columns(name: BenchmarkName, fields: FieldMap, row: Row, index: int) -> Example:
    example = to_example(row, fields, index)
    if example is None:
        raise StageError(
            f"benchmark {name}: row {index} lacks one of {', '.join(_required(fields))}: complete the copy"
        )
    return example


def _read_form(name: BenchmarkName, form: RowForm, row: Row, index: int) -> Example:
    try:
        return form.read(row, index)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise StageError(
            f"benchmark {name}: row {index} cannot be read ({type(error).__name__}: {error}; columns: "
            f"{', '.join(row)}); {how_to_provide(name)}"
        ) from error


def _present_fields(name: BenchmarkName, fields: FieldMap, columns: Sequence[str]) -> FieldMap:
    """The benchmark's fields without an id or tier column that is not there."""
    if missing := [column for column in _required(fields) if column not in columns]:
        raise StageError(
            f"benchmark {name}: no column {', '.join(missing)} (columns: {', '.join(columns)}); {how_to_provide(name)}"
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
