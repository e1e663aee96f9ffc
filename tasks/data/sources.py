"""Where a data set lies: which files are meant, their digest, and plain text joined to what belongs together."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from artifacts.files import file_sha256
from tasks.data.fields import Example, Row
from tasks.data.files import cannot_open, check_format, format_of, read_file
from tasks.data.wording import listed, shorten
from tasks.runtime.stage import StageError

_NOT_A_HUB_ID = re.compile(
    r"^[./~]|[\\:]|/.*/|\.(jsonl|ndjson|parquet|arrow|feather|txt|json|csv|tsv|gz|bz2|xz|zst)$", re.I
)
# A level-one heading of WikiText, which opens an article: " = Title = ".
_ARTICLE = re.compile(r"^\s*= (?!=).* =\s*$")
# What lies beside data and is none: of a folder that `datasets` has saved, and of the hub's clones.
_STATE, _SPLITS = "state.json", "dataset_dict.json"
_NO_DATA = {_STATE, _SPLITS, "dataset_info.json", "dataset_infos.json", "config.json", "package.json"}


def is_local(source: str) -> bool:
    """Whether `source` is a path of this machine, not a hub id; StageError for what looks like one but is not there."""
    path = _path(source)
    try:
        if path.exists():
            return True
        is_link = path.is_symlink()
    except OSError as error:
        raise cannot_open(path, error) from error
    if is_link:
        raise StageError(f"{shorten(path.name, 60)}: a link to a file that is not there: give a path that exists")
    if _NOT_A_HUB_ID.search(source):
        raise StageError(
            f"no such file or folder: {shorten(source, 120)}; give a path that exists, a hub data set id, or 'bundled'"
        )
    return False


def local_files(source: str, split: str, subset: str | None = None) -> list[Path]:
    """The files behind a local path; StageError names the choice there is.

    In a folder, or its subfolder `subset`, these are the data files whose names start with the split, or all of them
    for the split "all"; in one that `datasets.save_to_disk` has written, the split's.
    """
    path = _path(source)
    try:
        if path.is_dir():
            return _folder_files(_subfolder(path, subset), split)
        if not path.is_file():
            raise StageError(f"{shorten(path, 120)}: neither a file nor a folder: give one of them")
    except OSError as error:
        raise cannot_open(path, error) from error
    check_format(path)
    return [path]


def files_digest(files: Sequence[Path]) -> str:
    """sha256 over names and contents, independent of where the files lie."""
    total = hashlib.sha256()
    for file in files:
        try:
            content = file_sha256(file)
        except OSError as error:
            raise cannot_open(file, error) from error
        total.update(f"{file.name}\0{content}\n".encode(errors="surrogateescape"))
    return total.hexdigest()


def read_rows(files: Sequence[Path]) -> Iterator[Row]:
    """The rows of data files; a plain text file gives a row {"text": ...} per line."""
    return (row for file in files for _, row in read_file(file))


def read_dataset(folder: Path) -> list[Example]:
    """The examples of a dataset artifact."""
    import pyarrow.parquet as pq

    return [Example(**row) for row in pq.read_table(folder / "data.parquet").to_pylist()]


def articles(rows: Iterable[Row], text: str) -> Iterator[dict[str, str]]:
    """WikiText lines joined to articles, each from its level-one heading to the next."""
    lines: list[str] = []
    for row in rows:
        line = row.get(text)
        if line is None:
            continue
        if not isinstance(line, str):
            raise StageError(
                f"column {shorten(text, 40)!r} (text_field) holds a {type(line).__name__}, no text: name another"
            )
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


def _path(source: str) -> Path:
    try:
        return Path(source).expanduser()
    except RuntimeError as error:  # the home of a user who does not exist
        raise StageError(f"{shorten(source, 120)}: {error}: give the path in full") from error


def _subfolder(folder: Path, subset: str | None) -> Path:
    """Clones of the hub have a folder per subset; other copies need none."""
    inner = folder / (subset or "")
    return inner if inner.is_dir() else folder


def _folder_files(folder: Path, split: str) -> list[Path]:
    if (folder / _SPLITS).is_file():
        return _saved_splits(folder, split)
    if (folder / _STATE).is_file():
        return _saved_files(folder)
    found = [path for path in sorted(folder.rglob("*")) if _is_data(path.relative_to(folder)) and not path.is_dir()]
    chosen = [path for path in found if split == "all" or path.name.startswith(split)]
    if not chosen:
        names = listed(str(path.relative_to(folder)) for path in found) or "none"
        raise StageError(
            f"{shorten(folder.name, 40)}: no data file name starts with the split {shorten(split, 30)!r} (data files: "
            f"{names}); name one of the files, set split to a name's beginning, or split=all"
        )
    for path in chosen:
        if not path.is_file():
            raise StageError(f"{shorten(path.name, 60)}: a link to nothing, or no file: mend it, or take it away")
    return chosen


def _is_data(path: Path) -> bool:
    """By its name: no hidden file, no description."""
    return format_of(path) is not None and path.name not in _NO_DATA and not any(p.startswith(".") for p in path.parts)


def _saved_splits(folder: Path, split: str) -> list[Path]:
    splits = [name for name in _description(folder / _SPLITS, "splits") if isinstance(name, str)]
    wanted = splits if split == "all" else [split]
    if unknown := [name for name in wanted if name not in splits or not (folder / name).is_dir()]:
        raise StageError(
            f"{shorten(folder.name, 60)} has no split {shorten(unknown[0], 40)!r} (splits: {listed(splits)}): set split"
        )
    return [file for name in wanted for file in _saved_files(folder / name)]


def _saved_files(folder: Path) -> list[Path]:
    """The files of a data set that `datasets.save_to_disk` has written, in its order."""
    entries = _description(folder / _STATE, "_data_files")
    names = [entry.get("filename") if isinstance(entry, dict) else None for entry in entries]
    files = [folder / Path(name).name for name in names if isinstance(name, str)]
    if missing := [file for file in files if not file.is_file()]:
        raise StageError(
            f"{shorten(folder.name, 60)}: {shorten(missing[0].name, 60)} is missing: save the data set again"
        )
    return files


def _description(file: Path, key: str) -> list[Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))[key]
    except (OSError, ValueError, RecursionError, LookupError, TypeError) as error:
        raise StageError(
            f"{file.parent.name}/{file.name}: no description of a saved data set: save it again"
        ) from error
    if not isinstance(found, list):
        raise StageError(f"{file.parent.name}/{file.name}: {key} is no list: save the data set again")
    return found
