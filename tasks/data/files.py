"""Reading data files: one reader per kind of file, and one message for whatever is wrong with one.

A new kind is one function in `readers.py` and one line in FORMATS.  Files are the user's and may be anything: each is
read rightly, or refused with its name, the line where there is one, the cause and the remedy.
"""

from __future__ import annotations

import gzip
import lzma
import zlib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.data import readers
from tasks.data.lines import PACKED, BrokenFileError
from tasks.data.readers import Numbered
from tasks.data.wording import first_line, shorten
from tasks.runtime.stage import StageError

if TYPE_CHECKING:
    import pyarrow as pa

_DAMAGED = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)


@dataclass(frozen=True)
class Format:
    """Either the rows of a file, or for columnar files batches of the columns asked for (None: of all)."""

    rows: Callable[[Path], Iterator[Numbered]] | None = None
    batches: Callable[[Path, Collection[str] | None], Iterator[pa.RecordBatch]] | None = None


FORMATS = {
    ".jsonl": Format(readers.json_lines),
    ".ndjson": Format(readers.json_lines),
    ".json": Format(readers.json_rows),
    ".csv": Format(readers.csv_rows),
    ".tsv": Format(readers.csv_rows),
    ".txt": Format(readers.txt_rows),
    ".parquet": Format(batches=readers.parquet_batches),
    ".arrow": Format(batches=readers.arrow_batches),
    ".feather": Format(batches=readers.arrow_batches),
}


def format_of(file: Path) -> Format | None:
    """How a file is read, by its name; None for a kind that cannot be read."""
    name = Path(file.name.lower())
    if name.suffix in PACKED:
        inner = FORMATS.get(Path(name.stem).suffix)
        return inner if inner and inner.rows else None
    return FORMATS.get(name.suffix)


def check_format(file: Path) -> Format:
    """How a file is read; StageError names the kinds there are."""
    found = format_of(file)
    if found is None:
        kinds = f"{', '.join(FORMATS)} (text also packed: {', '.join(PACKED)})"
        raise StageError(f"{_named(file)}: cannot read this kind of file; use one of {kinds}")
    return found


def is_plain_text(file: Path) -> bool:
    """Whether the rows of a file are lines of text."""
    return check_format(file).rows is readers.txt_rows


def read_file(file: Path, columns: Collection[str] | None = None) -> Iterator[Numbered]:
    """The rows of a file, numbered; a columnar file gives these columns only.  StageError for what cannot be read."""
    found = check_format(file)
    with told(file):
        if found.rows is not None:
            yield from found.rows(file)
        elif found.batches is not None:
            yield from readers.batch_rows(found.batches(file, columns))


def read_batches(file: Path) -> Iterator[pa.RecordBatch] | None:
    """A columnar file in batches of all its columns; None for a file of another kind.  To be read within `told`."""
    found = check_format(file)
    return None if found.batches is None else found.batches(file, None)


def cannot_open(file: Path, error: OSError) -> StageError:
    """Why a file cannot even be opened."""
    why = shorten(error.strerror or first_line(error))
    return StageError(f"{_named(file)}: cannot be opened ({why}): check that it is there and that you may read it")


@contextmanager
def told(file: Path) -> Iterator[None]:
    """Whatever goes wrong in reading the file is one message."""
    try:
        yield
    except StageError:
        raise
    except BrokenFileError as broken:
        place = _named(file) + (f", line {broken.line}" if broken.line else "")
        raise StageError(f"{place}: {shorten(broken.cause, 120)}; {broken.remedy}") from broken
    except _DAMAGED as error:
        why = first_line(error, 80)
        raise StageError(f"{_named(file)}: cut off, or not packed as its name says ({why}): get it again") from error
    except MemoryError as error:
        raise StageError(f"{_named(file)}: too large for this machine's memory: split the file") from error
    except Exception as error:  # a parser's own errors: a file fails in every way that a program's input can
        if isinstance(error, OSError) and error.errno is not None:
            raise cannot_open(file, error) from error
        raise StageError(f"{_named(file)}: damaged or cut off ({first_line(error)}): get the file again") from error


def _named(file: Path) -> str:
    return shorten(file.name, 60)
