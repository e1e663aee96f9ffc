"""The sources of first-party modules as this process has imported them: a file may have changed since.

`record` is called when this package is imported, which `tasks` does before anything of it is. Byte code in
`__pycache__` is matched by size and whole seconds, so that of an edit within a second would pass: such a file is
compiled again.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from types import CodeType, ModuleType

from artifacts.modules import FIRST_PARTY

_SOURCES: dict[str, bytes] = {}


class _Loader(importlib.machinery.SourceFileLoader):
    def get_data(self, path: str) -> bytes:
        content = super().get_data(path)
        if path == self.path:
            _SOURCES[self.name] = content
        return content

    def get_code(self, fullname: str) -> CodeType | None:
        source = self.get_data(self.path)
        if _may_be_stale(self.path):
            return self.source_to_code(source, self.path)
        return super().get_code(fullname)


def _may_be_stale(path: str) -> bool:
    """Whether there is byte code that was written in the second in which the source was."""
    try:
        written = os.stat(importlib.util.cache_from_source(path)).st_mtime_ns
    except (OSError, NotImplementedError):
        return False
    return written // 10**9 <= os.stat(path).st_mtime_ns // 10**9


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] not in FIRST_PARTY:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and type(spec.loader) is importlib.machinery.SourceFileLoader:
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


def record() -> None:
    """Keep the source of every first-party module that is imported from now on."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def loaded_sources() -> dict[str, bytes]:
    """By module name, as imported."""
    return dict(_SOURCES)
