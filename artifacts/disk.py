"""What a full, read-only or nonsensical place means to the user, whichever library met it."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

ROOT_VARIABLE = "REASONING_QAT_STORE"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# safetensors and tokenizers raise types of their own that carry the system's words, not its number.
FULL_WORDS = ("No space left on device", "Disk quota exceeded", "File too large", "database or disk is full")
LEAST_FREE = 1 << 20  # bytes
LONGEST_PATH, LONGEST_REASON = 100, 120


class StoreError(Exception):
    """The store cannot do what was asked; the message names the remedy."""


def is_full(error: BaseException | None, root: Path | None = None) -> bool:
    """Whether `error`, or what it was raised from, says that the disk is full, or the disk of `root` itself does."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return True
        if isinstance(error, Exception) and any(words in str(error) for words in FULL_WORDS):
            return True
        error = error.__cause__ or error.__context__
    with contextlib.suppress(OSError):  # some libraries only say that they wrote less than they wanted
        return root is not None and shutil.disk_usage(root).free < LEAST_FREE
    return False


@contextlib.contextmanager
def disk_errors(root: Path, about: str = "") -> Iterator[None]:
    """Turn what the file system says inside into one StoreError that names the store, the cause and the remedy."""
    try:
        yield
    except OSError as error:
        cause, remedy = _cause(error)
        message = f"{cause} (store {shown(root)}): {remedy}, or set {ROOT_VARIABLE} to another folder"
        if about:
            message = f"{about}: {message}"
        raise StoreError(message) from error


def is_unwritable(error: BaseException) -> bool:
    """Whether `error` says that a place may not be written, or read."""
    return isinstance(error, OSError) and (isinstance(error, PermissionError) or error.errno == errno.EROFS)


def _cause(error: OSError) -> tuple[str, str]:
    at = f": {shown(error.filename)}" if error.filename else ""
    if is_full(error):
        return "the disk is full", "free space"
    if isinstance(error, NotADirectoryError | FileExistsError):
        return f"a file is where a folder is needed{at}", "move it away"
    if is_unwritable(error):
        return f"not writable{at}", "make the folder writable"
    return f"{error.strerror or error}{at}", "mend the folder"


def shown(path: object) -> str:
    """A path for a message: of a long one its end."""
    text = str(path)
    return text if len(text) <= LONGEST_PATH else "..." + text[3 - LONGEST_PATH :]


def brief(reason: str, longest: int = LONGEST_REASON) -> str:
    """A reason for a message: of a long one its beginning."""
    return reason if len(reason) <= longest else reason[: longest - 3] + "..."


def given_folder(path: Path | str) -> Path:
    """The folder a person named, as an absolute path; StoreError where that names nothing."""
    try:
        return Path(path).expanduser().resolve()
    except (OSError, ValueError, RuntimeError) as error:  # NUL bytes, loops of links, the home of nobody
        raise StoreError(f"{shown(path)!r} names no folder ({error}): set {ROOT_VARIABLE} to another") from error
