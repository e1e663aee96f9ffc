"""Text of data files: unpacked, decoded, cut into lines, each with a bound, so that no file takes the machine."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

MOST_LINE_BYTES = 2**27
"""Of one line, or one csv field."""
MOST_JSON_BYTES = 2**29
"""Of a file that is held in memory as a whole: .json, and UTF-16."""
UNPACKED_FREELY, MOST_EXPANSION = 2**28, 100
"""A packed file may give UNPACKED_FREELY bytes, or MOST_EXPANSION times its own size if that is more: text packs 3 to
20 times, a decompression bomb 1,000 times and more."""
_UTF8_MARK, _UTF16_MARKS = b"\xef\xbb\xbf", (b"\xff\xfe", b"\xfe\xff")
_LFS_POINTER = b"version https://git-lfs"


class BrokenFileError(Exception):
    """What is wrong with a file, and what to do; `files.py` names the file."""

    def __init__(self, cause: str, remedy: str, line: int | None = None) -> None:
        super().__init__(cause)
        self.cause, self.remedy, self.line = cause, remedy, line


def lines(file: Path) -> Iterator[tuple[int, str]]:
    """(number, line with its end) of a UTF-8 file, or of a UTF-16 one that says so."""
    with _opened(file) as stream:
        if stream.peek(2)[:2] in _UTF16_MARKS:
            yield from enumerate(io.StringIO(whole_text(file), newline="\n"), start=1)
            return
        most, total, number = most_bytes(file), 0, 0
        while line := stream.readline(MOST_LINE_BYTES + 1):
            number, total = number + 1, total + len(line)
            if len(line) > MOST_LINE_BYTES:
                cause = f"a line of more than {MOST_LINE_BYTES >> 20} MiB"
                raise BrokenFileError(cause, "write one row per line", number)
            if total > most:
                raise unpacks_to_too_much(most)
            yield number, _decoded(line.removeprefix(_UTF8_MARK) if number == 1 else line, number)


def whole_text(file: Path) -> str:
    """All the text of a file."""
    most = min(MOST_JSON_BYTES, most_bytes(file))
    with _opened(file) as stream:
        content = stream.read(most + 1)
    if len(content) > most:
        if most < MOST_JSON_BYTES:
            raise unpacks_to_too_much(most)
        cause = f"more than {MOST_JSON_BYTES >> 20} MiB in one piece"
        raise BrokenFileError(cause, "save it as JSON Lines (.jsonl) in UTF-8, which is read line by line")
    if content[:2] not in _UTF16_MARKS:
        return _decoded(content.removeprefix(_UTF8_MARK), 1)
    try:
        return content.decode("utf-16")
    except UnicodeDecodeError as error:
        raise BrokenFileError(f"begins as UTF-16, but is not ({error.reason})", "save it as UTF-8") from error


def most_bytes(file: Path) -> int:
    """That a file may unpack to."""
    return max(UNPACKED_FREELY, MOST_EXPANSION * file.stat().st_size)


def unpacks_to_too_much(most: int) -> BrokenFileError:
    cause = f"unpacks to more than {most >> 20} MiB, which no text packed so small does"
    return BrokenFileError(cause, "unpack it yourself if you trust it")


def refuse_pointer(start: bytes) -> None:
    """A clone without `git lfs pull` has pointers in place of its files."""
    if start.startswith(_LFS_POINTER):
        raise BrokenFileError("a Git LFS pointer, not the data", "fetch the data with `git lfs pull`")


def _opened(file: Path) -> io.BufferedReader:
    opener = next((open_ for suffix, open_ in PACKED.items() if file.name.lower().endswith(suffix)), None)
    stream = opener(file) if opener else file.open("rb", buffering=0)
    buffered = io.BufferedReader(stream, 2**16)
    refuse_pointer(buffered.peek(64))
    return buffered


def _decoded(content: bytes, line: int) -> str:
    """`line` is the number of the first line in `content`."""
    if b"\0" in content:
        line += content.count(b"\n", 0, content.index(b"\0"))
        raise BrokenFileError("NUL bytes: UTF-16 without a mark, or no text at all", "save it as UTF-8", line)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line += content.count(b"\n", 0, error.start)
        cause = f"not UTF-8 (byte 0x{content[error.start]:02x})"
        raise BrokenFileError(cause, "convert it, e.g. iconv -f LATIN1 -t UTF-8 if it is Latin-1", line) from error


def _zstd(file: Path) -> Any:
    import pyarrow as pa

    return pa.input_stream(str(file), compression="zstd")


PACKED: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _zstd}
