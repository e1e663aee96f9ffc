"""Raw rows of data sets from local files and from the hub: mappings from column names to values."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tasks.data.fields import Example, Row
from tasks.runtime.stage import StageError

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet", ".csv", ".txt", ".txt.gz")
_READ_BYTES = 2**22
_HUB_REMEDY = "check the name and the network, or give a local .jsonl, .parquet, .csv or .txt file instead"
_NOT_A_HUB_ID = re.compile(r"^[./~]|[\\:]|/.*/|\.(jsonl|parquet|txt|json|csv|gz)$")
# A level-one heading of WikiText, which opens an article: " = Title = ".
_ARTICLE = re.compile(r"^\s*= (?!=).* =\s*$")


def is_local(source: str) -> bool:
    """Whether `source` is a path of this machine, not a hub id; StageError for what looks like one but is not there."""
    if Path(source).expanduser().exists():
        return True
    if _NOT_A_HUB_ID.search(source):
        raise StageError(f"no such file or folder: {source}; give a path that exists, a hub data set id, or 'bundled'")
    return False


def local_files(source: str, split: str) -> list[Path]:
    """The files behind a local path; StageError names the choice there is.

    In a folder these are the data files whose names start with the split, or all of them for the split "all".
    """
    path = Path(source).expanduser()
    if path.is_file():
        if not path.name.endswith(SUFFIXES):
            raise StageError(f"{path.name}: cannot read this kind of file; use one of {', '.join(SUFFIXES)}")
        return [path]
    found = sorted(file for file in path.rglob("*") if file.is_file() and file.name.endswith(SUFFIXES))
    chosen = [file for file in found if split == "all" or file.name.startswith(split)]
    if not chosen:
        names = ", ".join(str(file.relative_to(path)) for file in found) or "none"
        raise StageError(
            f"{path}: no data file name starts with the split {split!r} (data files: {names}); name one of the files, "
            "set split to a name's beginning, or split=all"
        )
    return chosen


def files_digest(files: Sequence[Path]) -> str:
    """sha256 over names and contents, independent of where the files lie."""
    total = hashlib.sha256()
    for file in files:
        content = hashlib.sha256()
        with file.open("rb") as stream:
            while block := stream.read(_READ_BYTES):
                content.update(block)
        total.update(f"{file.name}\0{content.hexdigest()}\n".encode())
    return total.hexdigest()


def read_rows(files: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """Rows of JSON Lines, parquet and CSV files; a plain text file gives a row {"text": ...} per line."""
    import pyarrow.parquet as pq

    for file in files:
        if file.name.endswith(".parquet"):
            for batch in pq.ParquetFile(file).iter_batches(batch_size=1024):
                yield from batch.to_pylist()
            continue
        if file.suffix == ".csv":
            with file.open(encoding="utf-8", newline="") as table:
                yield from csv.DictReader(table)
            continue
        with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as lines:
            yield from _text_rows(lines) if ".txt" in file.suffixes else _json_rows(lines, file.name)


def read_dataset(folder: Path) -> list[Example]:
    """The examples of a dataset artifact."""
    import pyarrow.parquet as pq

    return [Example(**row) for row in pq.read_table(folder / "data.parquet").to_pylist()]


def hub_rows(
    source: str, subset: str | None, split: str, revision: str | None, remedy: str = _HUB_REMEDY
) -> tuple[Iterable[Row], str | None]:
    """(rows, commit) of a hub data set; StageError with the remedy if it cannot be had."""
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    try:
        loaded = datasets.load_dataset(source, subset, split=split, revision=revision)
    except (OSError, HfHubHTTPError, datasets.exceptions.DatasetsError) as error:
        raise StageError(
            f"cannot fetch data set {source!r} (revision {revision or 'newest'}) from the hub "
            f"({type(error).__name__}: {str(error).splitlines()[0]}); {remedy}"
        ) from error
    except ValueError as error:  # an unknown subset or split; the message lists those there are
        raise StageError(f"data set {source!r}: {error}") from error
    downloads = " ".join(loaded.info.download_checksums or ())
    commit = re.search(r"@([0-9a-f]{40})/", downloads)
    return loaded, commit.group(1) if commit else revision


def articles(rows: Iterable[Row], text: str) -> Iterator[dict[str, str]]:
    """WikiText lines joined to articles, each from its level-one heading to the next."""
    lines: list[str] = []
    for row in rows:
        line = row[text]
        if _ARTICLE.match(line) and lines:
            yield {text: "".join(lines)}
            lines = []
        lines.append(line if line.endswith("\n") else line + "\n")
    yield {text: "".join(lines)}


def paragraphs(rows: Iterable[Row], text: str) -> Iterator[dict[str, str]]:
    """Lines joined to paragraphs, which blank lines part."""
    lines: list[str] = []
    for row in rows:
        if row[text].strip():
            lines.append(row[text].rstrip("\n"))
        elif lines:
            yield {text: "\n".join(lines)}
            lines = []
    if lines:
        yield {text: "\n".join(lines)}


def _text_rows(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    return ({"text": line} for line in lines)


def _json_rows(lines: Iterable[str], name: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise StageError(f"{name}, line {number}: not JSON ({error}); each line must hold one object") from error
        if not isinstance(row, dict):
            raise StageError(f"{name}, line {number}: each line must hold one JSON object with named columns")
        yield row
