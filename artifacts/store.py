"""The store on disk. An artifact appears whole or not at all, and is read only after every byte was verified.

Two depths.  `plan` and `ls` compare sizes and time stamps, which costs a stat per file.  Whatever uses an artifact
(a hit of a run, the input of a stage, a comparison) goes through `lookup(full=True)` or `path`, which hash every file
once per process: about 5 s of a CPU for a checkpoint of 8 GB, a quarter of that on four cores.  What is damaged is set
aside, so that its stage runs again.

objects/<kind>/<digest>/   an artifact: its files and MANIFEST.json, read-only
records/<key>.json         which artifact a stage run gave, with its whole key payload and provenance
code/<digest>.json         the definitions that the code of a payload consists of
ledger.jsonl               append-only history
tmp/.tmp-*                 being written; removed once its owner is dead
work/<key>/                mid-stage state, kept for resuming
locks/<name>.lock          held by flock
quarantine/                damaged artifacts and records, <digest>-<n>; nothing reads them, and they may be deleted
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from artifacts import manifest, records
from artifacts.disk import ROOT_VARIABLE, StoreError, brief, disk_errors, given_folder, shown
from artifacts.files import flush, move_aside
from artifacts.keys import REPOSITORY, digest
from artifacts.ledger import Ledger, now
from artifacts.locks import FileLock, Owner
from artifacts.record_files import RecordFiles
from artifacts.records import Definitions, Record
from artifacts.refs import DIGEST, KIND, Ref
from artifacts.temporary import TemporaryFolders

FOLDERS = ("objects", "records", "code", "tmp", "locks", "work", "quarantine")
TELEMETRY_KIND = "telemetry"
MOST_CANDIDATES = 5  # shown when a prefix is ambiguous

logger = logging.getLogger(__name__)


class Store:
    """Content-addressed artifacts under `root` (default: $REASONING_QAT_STORE, or artifacts/store)."""

    def __init__(self, root: Path | str | None = None) -> None:
        chosen = root or os.environ.get(ROOT_VARIABLE) or REPOSITORY / "artifacts" / "store"
        self.root = given_folder(chosen)
        self.ledger = Ledger(self.root / "ledger.jsonl")
        self._temporary = TemporaryFolders(self.root / "tmp")
        self._records = RecordFiles(self.root, self._temporary)
        self._reported: set[tuple[str, str]] = set()
        with self._disk_errors():
            for name in FOLDERS:
                (self.root / name).mkdir(parents=True, exist_ok=True)
            self._temporary.remove_stale()

    def key(self, payload: dict[str, Any]) -> str:
        """sha256 of the payload {stage, version, code, config, inputs, maybe packages}; ValueError for other fields."""
        if not records.is_payload(payload):
            raise ValueError(f"a key payload has the fields {records.PAYLOAD_FIELDS}, not {tuple(payload)}")
        return digest(payload)

    def lookup(self, key: str, full: bool = False, again: bool = False) -> Record | None:
        """The record of `key` if its artifact is sound (manifest and sizes; `full`: every byte), else None.

        A damaged or deleted artifact is noted in the ledger; `explain` tells why.  With `full`, what is damaged is also
        set aside and told, so that the stage that is run now has the place to itself; what is missing is told too,
        unless the caller asks `again`.
        """
        record, reason = self._inspect(key, full)
        if reason and reason != "no record" and (key, reason) not in self._reported:
            self._reported.add((key, reason))
            with contextlib.suppress(OSError):  # a read must not fail because the history cannot be written
                self.ledger.append("damaged", key=key, reason=reason)
                if full and record is None:
                    move_aside(self._records.path(key), self.root / "quarantine" / "records" / key)
            if full and not (record and self.quarantine(record.ref, reason)) and not again:
                logger.warning("%s (record %s): the stage runs again", brief(reason), key[:12])
        return None if reason else record

    def explain(self, key: str, full: bool = False) -> str:
        """Why lookup gives None ("no record", "artifact missing: file x", "size differs: x"), or "sound"."""
        return self._inspect(key, full)[1] or "sound"

    def _inspect(self, key: str, full: bool) -> tuple[Record | None, str]:
        try:
            record = self._records.read(_checked(key))
            matches = record.key == key == self.key(record.payload)
        except FileNotFoundError:
            return None, "no record"
        except (OSError, ValueError) as error:
            return None, f"record unreadable: {brief(str(error))}"
        if not matches:
            return None, "record unreadable: it belongs to another key"
        return record, "; ".join(self.verify(record.ref, full))

    def records(self) -> Iterator[Record]:
        """Every readable record, oldest first. Files seen before are not read again."""
        return iter(sorted(self._records.all(), key=lambda record: (record.created, record.key)))

    def nearest(self, payload: dict[str, Any], code: Definitions | None = None) -> tuple[Record, list[str]] | None:
        """The record of the same stage that differs least, and the differences in words; None if none.

        With the definitions of the payload's code, those that differ are named.
        """
        record = records.nearest(payload, self._records.all())
        if record is None:
            return None
        return record, records.differences(
            record.payload, payload, self._records.definitions(record.payload["code"]), code
        )

    def keep_definitions(self, code: str, definitions: Definitions) -> None:
        """Keep what a payload's code consists of, so that a later difference can name it."""
        with self._disk_errors():
            self._records.keep_definitions(_checked(code), definitions)

    def new_folder(self) -> Path:
        """An empty folder to write an artifact into; end with `commit` or `discard`."""
        with self._disk_errors():
            return self._temporary.new()

    def discard(self, folder: Path) -> None:
        """Remove a folder of `new_folder` that will not be committed; nothing happens if it was committed."""
        self._temporary.remove(folder)

    def commit(
        self,
        folder: Path,
        kind: str,
        key: str,
        payload: dict[str, Any],
        provenance: dict[str, Any],
        *,
        telemetry: Path | None = None,
    ) -> Ref:
        """Make `folder` (of `new_folder`) the artifact of `key`: flush, rename into place, record, ledger.

        `telemetry`, a folder on the store's file system, becomes an artifact that only the record names: both are
        there, or neither. `folder` is gone afterwards, whatever happens. StoreError if the disk is full or it is no
        artifact.
        """
        if self.key(payload) != key:
            raise ValueError("the key is not the key of the payload: pass store.key(payload)")
        try:
            with self._disk_errors():
                ref = self._add(folder, kind)
                measured = None if telemetry is None else self._add(telemetry, TELEMETRY_KIND)
                record = Record(key, payload, ref, provenance, now(), measured)
                self._records.write(record)
                self.ledger.append("commit", **record.to_dict())
        except ValueError as error:
            raise StoreError(f"cannot commit a {kind}: {error}") from error
        finally:
            self.discard(folder)
        return ref

    def _add(self, folder: Path, kind: str) -> Ref:
        entries = manifest.describe(folder)
        ref = manifest.reference(kind, entries)
        manifest.seal(folder, ref, entries)
        self._install(folder, ref)
        return ref

    def _install(self, folder: Path, ref: Ref) -> None:
        target = self._object_path(ref)
        target.parent.mkdir(exist_ok=True)
        with self._file_lock(f"object-{ref.digest}"):
            if found := self.verify(ref, full=True):
                if target.exists():
                    self.ledger.append("repaired", ref=str(ref), reason="; ".join(found))
                    aside = self.new_folder()
                    os.rename(target, aside / "damaged")
                    os.rename(folder, target)
                    self.discard(aside)
                else:
                    os.rename(folder, target)
                flush(target.parent)

    def path(self, ref: Ref) -> Path:
        """The folder of an artifact, every byte verified; its files are read-only.

        StoreError if it is not in the store, or is damaged: it is set aside then.
        """
        found = self.verify(ref, full=True) if self.folder(ref) else []
        if found and self.quarantine(ref, "; ".join(found)):
            raise StoreError(f"{_named(ref, found[0])} is damaged and was set aside: run its stage again")
        return self.folder(ref)

    def folder(self, ref: Ref) -> Path:
        """Where an artifact lies, sound or not. StoreError if it is not in the store."""
        path = self._object_path(ref)
        if not path.is_dir():
            raise StoreError(f"{ref.kind}:{ref.short} is not in {shown(self.root)}: run its stage again")
        return path

    def quarantine(self, ref: Ref, reason: str) -> Path | None:
        """Move a damaged artifact to quarantine/, where no run finds it, and say so in one line; None if it is gone."""
        source = self._object_path(ref)
        with self._disk_errors(_named(ref, reason)), self._file_lock(f"object-{ref.digest}"):
            if not source.is_dir() or not self.verify(ref, full=True):  # another process was here first
                return None
            target = move_aside(source, self.root / "quarantine" / ref.kind / ref.digest)
            with contextlib.suppress(OSError):
                self.ledger.append("quarantined", ref=str(ref), reason=reason, moved_to=str(target))
        where = f"{target.parent.relative_to(self.root)}/{ref.short}...{target.name[len(ref.digest) :]}"
        logger.warning("damaged: %s; set aside in %s, its stage makes it again", _named(ref, reason), where)
        return target

    def verify(self, ref: Ref, full: bool = False) -> list[str]:
        """What is wrong with an artifact: manifest, files, sizes, with `full` every byte. Empty if sound."""
        return manifest.problems(self._object_path(ref), ref, full)

    def resolve(self, prefix: str) -> Ref:
        """The one artifact whose digest begins with `prefix`, with or without "kind:"; else StoreError."""
        kind, _, start = prefix.strip().rpartition(":")
        matches = [ref for ref in self._objects(kind) if start and ref.digest.startswith(start)]
        if len(matches) == 1:
            return matches[0]
        if not matches:
            given, root = brief(repr(prefix)), shown(self.root)
            raise StoreError(f"no artifact begins with {given} in {root}: `reasoning-qat ls` lists all")
        first = ", ".join(f"{ref.kind}:{ref.short}" for ref in matches[:MOST_CANDIDATES])
        more = f" and {len(matches) - MOST_CANDIDATES} more" if len(matches) > MOST_CANDIDATES else ""
        raise StoreError(f"{prefix!r} is ambiguous: {first}{more}. Give more digits, or the kind and a colon")

    def _objects(self, kind: str) -> Iterator[Ref]:
        """Every artifact there is a folder for, of one kind or (kind "") of all, sorted."""
        for folder in sorted((self.root / "objects").iterdir()):
            if kind in ("", folder.name) and KIND.fullmatch(folder.name) and folder.is_dir():
                yield from (Ref(folder.name, name) for name in sorted(os.listdir(folder)) if DIGEST.fullmatch(name))

    @contextlib.contextmanager
    def lock(self, key: str, on_wait: Callable[[Owner], None] | None = None) -> Iterator[None]:
        """`with store.lock(key):` one process at a time; `on_wait(owner)` tells who is waited for."""
        lock = self._file_lock(_checked(key), on_wait)
        with self._disk_errors():
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def scratch(self, key: str) -> Path:
        """The folder of `key` that survives a kill, for mid-stage state; made if it is not there."""
        folder = self.root / "work" / _checked(key)
        with self._disk_errors():
            folder.mkdir(exist_ok=True)
        return folder

    def clear_scratch(self, key: str) -> None:
        """Remove the mid-stage state of `key`."""
        shutil.rmtree(self.root / "work" / _checked(key), ignore_errors=True)

    def _file_lock(self, name: str, on_wait: Callable[[Owner], None] | None = None) -> FileLock:
        return FileLock(self.root / "locks" / f"{name}.lock", on_wait)

    def _object_path(self, ref: Ref) -> Path:
        return self.root / "objects" / ref.kind / ref.digest

    def _disk_errors(self, about: str = "") -> contextlib.AbstractContextManager[None]:
        return disk_errors(self.root, about)


def _named(ref: Ref, reason: str) -> str:
    return f"{ref.kind}:{ref.short} ({brief(reason)})"


def _checked(key: str) -> str:
    if not DIGEST.fullmatch(key):
        raise ValueError(f"key {key!r}: need the 64 hexadecimal digits of Store.key")
    return key
