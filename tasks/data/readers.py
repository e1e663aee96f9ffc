"""The rows of data files, one reader per kind."""

from __future__ import annotations

import csv
import json
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.data.lines import (
    MOST_LINE_BYTES,
    BrokenFileError,
    lines,
    most_bytes,
    refuse_pointer,
    unpacks_to_too_much,
    whole_text,
)
from tasks.data.wording import first_line, listed

if TYPE_CHECKING:
    import pyarrow as pa

ROW_LISTS = ("data", "rows", "examples", "instances", "train", "validation", "test")
"""Names under which a .json file with one object may hold its rows."""
_BATCH_ROWS = 1024

Numbered = tuple[int, dict[str, Any]]
"""(line or row number from 1, row)."""


def txt_rows(file: Path) -> Iterator[Numbered]:
    """A row {"text": line} per line."""
    for number, line in lines(file):
        yield number, {"text": line.removesuffix("\r\n") + "\n" if line.endswith("\r\n") else line}


def json_lines(file: Path) -> Iterator[Numbered]:
    """JSON Lines; blank lines are skipped."""
    return _json_lines(lines(file))


def json_rows(file: Path) -> Iterator[Numbered]:
    """Of a list of objects, of an object with such a list, or of JSON Lines under another name."""
    text = whole_text(file)
    if not text.strip():
        return iter(())
    try:
        document = json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            return _json_lines(enumerate(text.split("\n"), start=1))
        remedy = "a list of objects, or JSON Lines, is expected"
        raise BrokenFileError(f"not JSON ({error.msg}, column {error.colno})", remedy, error.lineno) from error
    except (ValueError, RecursionError) as error:
        raise _unreadable_json(error, None) from error
    rows = _rows_of(document)
    return ((index, _object(row, f"item {index} is no object", None)) for index, row in enumerate(rows, start=1))


def csv_rows(file: Path) -> Iterator[Numbered]:
    """Of a table with a header; commas, else semicolons or tabs, part the fields."""
    csv.field_size_limit(MOST_LINE_BYTES)
    numbered = lines(file)
    first = next((line for _, line in numbered), "")
    delimiter = "\t" if ".tsv" in file.name.lower() else next((mark for mark in ",;\t" if mark in first), ",")
    reader = csv.reader(_chained(first, numbered), delimiter=delimiter, strict=True)
    header: list[str] = []
    try:
        for cells in reader:
            if not header:
                header = _unique_names(cells)
            elif cells:
                yield reader.line_num, _cells(header, cells, reader.line_num)
    except csv.Error as error:
        remedy = 'put fields with commas, quotes or line ends into "...", with "" for each quote'
        raise BrokenFileError(f"not csv ({error})", remedy, reader.line_num) from error


def parquet_batches(file: Path, columns: Collection[str] | None) -> Iterator[pa.RecordBatch]:
    """The columns of a parquet file, some rows at a time."""
    import pyarrow.parquet as pq

    _check_start(file)
    with pq.ParquetFile(file) as table:
        _unique_names(table.schema_arrow.names)
        unpacked = sum(table.metadata.row_group(i).total_byte_size for i in range(table.metadata.num_row_groups))
        if unpacked > (most := most_bytes(file)):
            raise unpacks_to_too_much(most)
        for batch in table.iter_batches(_BATCH_ROWS, columns=None if columns is None else list(columns)):
            batch.validate(full=True)  # texts are UTF-8 by promise only
            yield batch


def arrow_batches(file: Path, columns: Collection[str] | None) -> Iterator[pa.RecordBatch]:
    """Of the stream that `datasets` writes, or of an Arrow (feather) file."""
    import pyarrow as pa

    _check_start(file)
    with pa.memory_map(str(file)) as source:
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        table = pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)
        _unique_names(table.schema.names)
        batches: Iterable[pa.RecordBatch] = (
            (table.get_batch(i) for i in range(table.num_record_batches)) if is_file else table
        )
        for batch in batches:
            batch.validate(full=True)  # lengths and offsets that a damaged file gives are believed otherwise
            chosen = batch if columns is None else batch.select([c for c in columns if c in batch.schema.names])
            yield from (chosen.slice(start, _BATCH_ROWS) for start in range(0, chosen.num_rows, _BATCH_ROWS))


def batch_rows(batches: Iterable[pa.RecordBatch]) -> Iterator[Numbered]:
    """The rows of batches, counted."""
    number = 0
    for batch in batches:
        for row in batch.to_pylist():
            number += 1
            yield number, row


def _json_lines(numbered: Iterable[tuple[int, str]]) -> Iterator[Numbered]:
    for number, line in numbered:
        if line.strip():
            yield number, _object(_parsed(line, number), "no object", number)


def _parsed(line: str, number: int) -> Any:
    try:
        return json.loads(line, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        cause = f"not JSON ({error.msg}, column {error.colno})"
        raise BrokenFileError(cause, "each line must hold one object", number) from error
    except BrokenFileError as broken:
        raise BrokenFileError(broken.cause, broken.remedy, number) from None
    except (ValueError, RecursionError) as error:
        raise _unreadable_json(error, number) from error


def _unreadable_json(error: Exception, number: int | None) -> BrokenFileError:
    """An integer of 5,000 digits, 100,000 brackets."""
    return BrokenFileError(f"JSON that cannot be read ({first_line(error, 70)})", "simplify it", number)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        _unique_names([name for name, _ in pairs])
    return found


def _rows_of(document: Any) -> list[Any]:
    """The list of objects that a document is, or that an object in it holds under one of ROW_LISTS; else one row."""
    if isinstance(document, list):
        return document
    if not isinstance(document, dict):
        raise BrokenFileError("no list of objects", "each row must be an object with named columns")
    found = {
        k: v for k, v in document.items() if k in ROW_LISTS and isinstance(v, list) and v and isinstance(v[0], dict)
    }
    if len(found) > 1:
        raise BrokenFileError(f"several lists of rows ({listed(found)})", "save each as a file of its own")
    return next(iter(found.values()), [document])


def _object(value: Any, cause: str, number: int | None) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BrokenFileError(cause, "each row must be one JSON object with named columns", number)
    return value


def _chained(first: str, numbered: Iterator[tuple[int, str]]) -> Iterator[str]:
    if first:
        yield first
    yield from (line for _, line in numbered)


def _cells(header: list[str], cells: list[str], number: int) -> dict[str, Any]:
    if len(cells) != len(header):
        cause = f"{len(cells)} fields where the header has {len(header)}"
        raise BrokenFileError(cause, 'complete the row, or quote its fields with "..."', number)
    return dict(zip(header, cells, strict=True))


def _unique_names(names: list[str]) -> list[str]:
    if len(set(names)) < len(names):
        twice = dict.fromkeys(name for name in names if names.count(name) > 1)
        raise BrokenFileError(f"columns of the same name: {listed(twice)}", "rename one of them")
    return names


def _check_start(file: Path) -> None:
    with file.open("rb") as stream:
        start = stream.read(64)
    if not start:
        raise BrokenFileError("an empty file", "get the file again")
    refuse_pointer(start)
