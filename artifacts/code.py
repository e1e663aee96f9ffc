"""The code that a stage runs, as its key has it: the digest of the definitions that its body reaches."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from artifacts.classes import Sources
from artifacts.collector import paused
from artifacts.keys import REPOSITORY, digest
from artifacts.modules import Target
from artifacts.reach import Walk

_DIGITS = 16  # of a definition's digest: enough to see that it changed


@dataclass(frozen=True)
class Code:
    """`definitions`: by file and definition ("function solve_block") the beginning of its digest."""

    digest: str
    definitions: Mapping[str, Mapping[str, str]]
    scripts: frozenset[str] = frozenset()
    """Names of modules whose files are run by other processes, or read, while the stage runs."""


@dataclass(frozen=True)
class Entry:
    """Where a walk begins."""

    module: str
    name: str
    also: tuple[tuple[str, str], ...] = ()
    """Classes (module, name) whose objects it is given."""
    choices: tuple[tuple[str, str], ...] = ()
    """Table of choices ("quant.methods.registry:METHODS") and the entry that is taken."""


def code_of(entry: Entry, root: Path = REPOSITORY) -> Code:
    """The code that `entry` reaches, in the sources as they are now.  Raises ValueError if there is no such name."""
    code, read = _remembered(entry, root)
    if any(_state(path) != state for path, state in read):
        _remembered.cache_clear()
        code, _ = _remembered(entry, root)
    return code


@functools.lru_cache(maxsize=512)
def _remembered(entry: Entry, root: Path) -> tuple[Code, list[tuple[str, tuple[int, ...]]]]:
    """With the state, before they were read, of the files and folders that were read."""
    before = time.time_ns()
    walk = _walk(entry, root, {})
    known_modules = walk.sources.known.values()
    read = [part for known in known_modules if known for part in (str(known.folder), str(root / known.path))]
    states = [(path, _state(path)) for path in sorted(set(read))]
    if any(state[1:2] >= (before,) for _, state in states):
        states.append(("", (0,)))  # changed while it was read: not to be remembered
    return _code(entry, walk), states


def changed(code: Code, entry: Entry, loaded: Mapping[str, bytes], root: Path = REPOSITORY) -> list[str]:
    """Which definitions of `code` this process has otherwise ("tasks/dataset.py: function dataset").

    `loaded` holds sources as they were imported; what is not in it is taken as its file is now, and so is what other
    processes run as a file.
    """
    now = _code(entry, _walk(entry, root, loaded))
    files = code_of(entry, root) if code.scripts else now
    found = []
    for path, labels in code.definitions.items():
        name = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        seen = files if name in code.scripts else now
        found += [
            f"{path}: {label}" for label, value in labels.items() if seen.definitions.get(path, {}).get(label) != value
        ]
    return found


@paused()
def _walk(entry: Entry, root: Path, loaded: Mapping[str, bytes]) -> Walk:
    walk = Walk(Sources(root, loaded), dict(entry.choices))
    start = walk.sources.module(entry.module)
    if start is None or not start.knows(entry.name):
        raise ValueError(f"no {entry.name!r} in a module {entry.module!r} under {root}")
    walk.reach(start, entry.name)
    for module, name in entry.also:
        walk.follow(Target(module, name), ())
    walk.finish()
    return walk


def _code(entry: Entry, walk: Walk) -> Code:
    entries = {path: dict(sorted(found.items())) for path, found in sorted(walk.found.items())}
    total = digest({"entry": f"{entry.module}:{entry.name}", "definitions": entries})
    short = {path: {label: value[:_DIGITS] for label, value in found.items()} for path, found in entries.items()}
    return Code(total, short, frozenset(walk.scripts))


def _state(path: str) -> tuple[int, ...]:
    try:
        state = os.stat(path)
    except OSError:
        return ()
    return state.st_mtime_ns, state.st_ctime_ns, state.st_size, state.st_ino
