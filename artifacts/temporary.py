"""Folders being written, on the store's file system so that they can be renamed into place.

Each has a lock beside it, held by its writer; whoever opens the store removes the folders whose lock is free.
"""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path

from artifacts.locks import FileLock

PREFIX = ".tmp-"
LOCK_SUFFIX = ".lock"


class TemporaryFolders:
    """Makes and removes `root`/.tmp-*."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._locks: dict[Path, FileLock] = {}

    def new(self) -> Path:
        """An empty folder, protected from removal while this process lives. Raises OSError on a full disk."""
        folder = self.root / f"{PREFIX}{secrets.token_hex(8)}"
        self._locks[folder] = FileLock(folder.with_suffix(LOCK_SUFFIX))
        try:
            self._locks[folder].acquire()
            folder.mkdir()
        except BaseException:
            self.remove(folder)
            raise
        return folder

    def remove(self, folder: Path) -> None:
        """Remove the folder if it is still there, then its lock."""
        shutil.rmtree(folder, ignore_errors=True)
        if lock := self._locks.pop(folder, None):
            lock.release()

    def remove_stale(self) -> None:
        """Remove what killed writers left."""
        names = {name.removesuffix(LOCK_SUFFIX) for name in os.listdir(self.root) if name.startswith(PREFIX)}
        for name in names:
            lock = FileLock(self.root / f"{name}{LOCK_SUFFIX}")
            if lock.try_acquire():
                shutil.rmtree(self.root / name, ignore_errors=True)
                lock.release()
