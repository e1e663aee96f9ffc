"""Records on the disk, and the definitions that the code of their payloads consists of; files appear whole."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from artifacts.collector import paused
from artifacts.files import SETTLED_NS, flush
from artifacts.records import Definitions, Record
from artifacts.temporary import TemporaryFolders


class RecordFiles:
    """records/<key>.json and code/<digest>.json below `root`."""

    def __init__(self, root: Path, temporary: TemporaryFolders) -> None:
        self._root, self._temporary = root, temporary
        self._seen: dict[str, tuple[tuple[int, int], Record | None]] = {}
        self._changed = 0

    def path(self, key: str) -> Path:
        return self._root / "records" / f"{key}.json"

    def read(self, key: str) -> Record:
        """OSError if it cannot be read, ValueError if it is damaged."""
        return Record.from_json(self.path(key).read_bytes())

    def write(self, record: Record) -> None:
        self._write(self.path(record.key), record.to_json())

    @paused()
    def all(self) -> list[Record]:
        """Every readable record, in any order.  Files read before are not read again, nor is the folder looked through
        if nothing was added to it.
        """
        changed = (self._root / "records").stat().st_mtime_ns
        if changed != self._changed:
            self._scan()
            self._changed = changed if time.time_ns() - changed > SETTLED_NS else 0
        return [record for _, record in self._seen.values() if record is not None]

    def _scan(self) -> None:
        seen = {}
        with os.scandir(self._root / "records") as entries:
            for entry in entries:
                state = entry.stat()
                stamp = (state.st_mtime_ns, state.st_ino)
                known = self._seen.get(entry.name)
                if known is None or known[0] != stamp:
                    known = (stamp, _readable(entry.path))
                seen[entry.name] = known
        self._seen = seen

    def keep_definitions(self, code: str, definitions: Definitions) -> None:
        target = self._root / "code" / f"{code}.json"
        if not target.exists():
            self._write(target, json.dumps({path: dict(found) for path, found in definitions.items()}).encode())

    def definitions(self, code: str) -> Definitions | None:
        """What `keep_definitions` kept; None if it did not, or it cannot be read."""
        try:
            found = json.loads((self._root / "code" / f"{code}.json").read_bytes())
        except (OSError, ValueError, RecursionError):
            return None
        whole = isinstance(found, dict) and all(isinstance(labels, dict) for labels in found.values())
        return found if whole else None

    def _write(self, target: Path, content: bytes) -> None:
        folder = self._temporary.new()
        try:
            (folder / target.name).write_bytes(content)
            flush(folder / target.name)
            os.replace(folder / target.name, target)
            flush(target.parent)
        finally:
            self._temporary.remove(folder)


def _readable(path: str) -> Record | None:
    try:
        with open(path, "rb", buffering=0) as file:
            return Record.from_json(file.read())
    except (OSError, ValueError):
        return None
