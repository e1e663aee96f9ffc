"""A sealed folder: its list of files with sizes and hashes gives the digest, and soundness is checked by it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from artifacts.files import file_sha256, flush
from artifacts.keys import digest
from artifacts.refs import Ref

MANIFEST = "MANIFEST.json"
FORMAT = 1
READ_ONLY = 0o444
HASHING_THREADS = min(4, os.cpu_count() or 1)  # hashing gives up the interpreter's lock


@dataclass(frozen=True, order=True)
class FileEntry:
    """One file: path relative to the artifact with '/' separators, size in bytes, sha256 of its contents."""

    path: str
    size: int
    sha256: str


def describe(folder: Path) -> list[FileEntry]:
    """Hash every file of `folder`, sorted by path. ValueError if it holds no files, or links or devices."""
    entries = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise ValueError(f"{name} is a link or a device: an artifact holds plain files, copy it")
        if path.is_file():
            entries.append(FileEntry(name, path.stat().st_size, file_sha256(path)))
    if not entries:
        raise ValueError("the stage wrote no files into its output folder")
    if any(entry.path == MANIFEST for entry in entries):
        raise ValueError(f"{MANIFEST} is the store's own file: do not copy it out of another artifact")
    return sorted(entries)


def reference(kind: str, entries: list[FileEntry]) -> Ref:
    """The artifact's name: sha256 over its kind and its sorted (path, size, sha256)."""
    return Ref(kind, digest({"kind": kind, "files": [[e.path, e.size, e.sha256] for e in sorted(entries)]}))


def seal(folder: Path, ref: Ref, entries: list[FileEntry]) -> None:
    """Write the manifest, make every file read-only, and flush files and folders to the disk."""
    (folder / MANIFEST).write_text(_text(ref, entries))
    for name in [*(entry.path for entry in entries), MANIFEST]:
        os.chmod(folder / name, READ_ONLY)
        flush(folder / name)
    for inner in sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True):
        flush(inner)
    flush(folder)


def _text(ref: Ref, entries: list[FileEntry]) -> str:
    files = [asdict(entry) for entry in entries]
    return json.dumps({"format": FORMAT, "kind": ref.kind, "digest": ref.digest, "files": files}, indent=1) + "\n"


def sealed_as(folder: Path) -> Ref:
    """What a folder's manifest calls it. OSError or ValueError if it cannot be read; nothing else is checked."""
    try:
        content = json.loads((folder / MANIFEST).read_bytes())
        return Ref(content["kind"], content["digest"])
    except (TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"no manifest: {error!r}") from error


def problems(folder: Path, ref: Ref, full: bool) -> list[str]:
    """What is wrong with artifact `ref` at `folder`; empty if sound.

    Sizes are compared, and a file written to after the manifest is hashed; `full` hashes every file (once per process).
    """
    if not folder.is_dir():
        return [f"artifact missing: no folder for {ref.kind}:{ref.short}"]
    try:
        text = (folder / MANIFEST).read_bytes()
        entries = [FileEntry(**entry) for entry in json.loads(text)["files"]]
        named = reference(ref.kind, entries)
        sealed = (folder / MANIFEST).stat().st_mtime_ns
    except FileNotFoundError:
        return [f"artifact missing: file {MANIFEST}"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        return [f"manifest unreadable ({MANIFEST}): {error}"]
    if named != ref:
        return [f"manifest describes another artifact, {named.kind}:{named.short}"]
    if text != _text(ref, entries).encode():
        return [f"content differs: {MANIFEST} was changed"]

    def problem(entry: FileEntry) -> str | None:
        return _file_problem(folder, entry, lambda modified: full or modified > sealed)

    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        found = [text for text in (pool.map if full else map)(problem, entries) if text is not None]
    return found + _unexpected(folder, {entry.path for entry in entries} | {MANIFEST})


def _file_problem(folder: Path, entry: FileEntry, is_hashed: Callable[[int], bool]) -> str | None:
    path = folder / entry.path
    if path.is_symlink() or not path.is_file():
        return f"artifact missing: file {entry.path}"
    state = path.stat()
    if state.st_size != entry.size:
        return f"size differs: {entry.path} has {state.st_size} bytes, the manifest says {entry.size}"
    try:
        if is_hashed(state.st_mtime_ns) and file_sha256(path) != entry.sha256:
            return f"content differs: {entry.path} does not have the sha256 of the manifest"
    except OSError as error:
        return f"unreadable: {entry.path}: {error.strerror}"
    return None


def _unexpected(folder: Path, names: set[str]) -> list[str]:
    # An added file can change how a model folder loads; hidden files (.DS_Store, .nfs*) no loader reads.
    present = (path for path in folder.rglob("*") if not path.is_dir())
    extra = sorted(path.relative_to(folder).as_posix() for path in present if not path.name.startswith("."))
    return [f"unexpected file: {name}" for name in extra if name not in names]
