"""Rows with named columns, from files or from the hub: what the columns hold in all of them, and the rows."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tasks.data.fields import OR, Row
from tasks.data.files import read_batches, read_file, told
from tasks.data.readers import batch_rows
from tasks.data.values import kind_of
from tasks.data.wording import shorten

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

_LOOKED_AT = 64  # values of a column in each batch, until one is no missing value


@dataclass
class Column:
    """What a column holds: the kinds of its values (`values.kind_of`), and its first value that is not missing."""

    kinds: list[str] = field(default_factory=list)
    first: Any = None

    @property
    def kind(self) -> str:
        return OR.join(self.kinds)

    def look(self, value: Any) -> None:
        kind = kind_of(value)
        if kind and kind not in self.kinds:
            self.first = value if not self.kinds else self.first
            self.kinds.append(kind)


Columns = dict[str, Column]


class Table(Protocol):
    """Rows that can be read more than once."""

    place: str
    """Where the row that was read last stands, for messages."""

    def columns(self) -> Columns:
        """Every column that any row has; {} for no rows."""

    def rows(self, names: Collection[str] | None = None) -> Iterator[Row]:
        """All rows; where it saves reading, with these columns only."""


class Files:
    """The rows of data files, one file after the other."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files
        self.place = ""

    def columns(self) -> Columns:
        found: Columns = {}
        for file in self.files:
            batches = read_batches(file)
            if batches is None:
                look_at_rows((row for _, row in read_file(file)), found)
            else:
                with told(file):
                    look_at_batches(batches, found)
        return found

    def rows(self, names: Collection[str] | None = None) -> Iterator[Row]:
        for file in self.files:
            unit = "line" if read_batches(file) is None else "row"
            for number, row in read_file(file, names):
                self.place = f"{shorten(file.name, 60)}, {unit} {number}"
                yield row


class HubTable:
    """The rows of a data set that `datasets` has fetched."""

    def __init__(self, dataset: datasets.Dataset, name: str) -> None:
        self._dataset = dataset
        self._name = name
        self.place = name

    def columns(self) -> Columns:
        found: Columns = {}
        look_at_batches(_batches(self._dataset), found)
        return found

    def rows(self, names: Collection[str] | None = None) -> Iterator[Row]:
        chosen = self._dataset if names is None else self._dataset.select_columns(list(names))
        for number, row in batch_rows(_batches(chosen)):
            self.place = f"{self._name}, row {number}"
            yield row


def look_at_rows(rows: Iterable[Row], found: Columns) -> None:
    """Add what the rows hold to `found`."""
    for row in rows:
        for name, value in row.items():
            found.setdefault(name, Column()).look(value)


def look_at_batches(batches: Iterable[pa.RecordBatch], found: Columns) -> None:
    """Add what the batches hold to `found`; a column of one type is looked at until a value is found."""
    for batch in batches:
        for name in batch.schema.names:
            column = found.setdefault(name, Column())
            if not column.kinds:
                for value in batch.column(name).drop_null().slice(0, _LOOKED_AT).to_pylist():
                    column.look(value)


def _batches(dataset: datasets.Dataset) -> Iterator[pa.RecordBatch]:
    for table in dataset.with_format("arrow").iter(batch_size=1024):
        yield from table.to_batches()
