"""Classes and what they derive from, across modules: whether one is a configuration, and what modules do by them."""

from __future__ import annotations

import ast
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

from artifacts import modules, syntax
from artifacts.modules import Module, Target

# How a stage is run, not what it computes: a change here must not recompute every checkpoint. Of it a body uses its
# folders and progress, and configuration classes their base, which only decides what is accepted.
INFRASTRUCTURE = ("artifacts", "tasks.runtime")
CONFIGURATION = ("tasks.runtime.stage", "StageConfig")
_MOST_HOPS = 20  # from import to import, in case they go round


class Sources:
    """The first-party modules under `root`; `loaded` are sources as a process has imported them."""

    def __init__(self, root: Path, loaded: Mapping[str, bytes]) -> None:
        self.root = root
        self.known: dict[str, Module | None] = {}
        self._loaded = loaded

    def module(self, name: str) -> Module | None:
        """None for what is no first-party module, and for infrastructure."""
        if name not in self.known:
            counts = not any(name == place or name.startswith(place + ".") for place in INFRASTRUCTURE)
            self.known[name] = modules.read_module(name, self.root, self._loaded.get(name)) if counts else None
        return self.known[name]

    def submodule(self, target: Target) -> Module | None:
        """The module that an imported name stands for, if it does."""
        return self.module(f"{target.module}.{target.name}")


def done_by(sources: Sources, module: Module, tables: Collection[str]) -> list[ast.stmt]:
    """The statements of a module that matter without being named; not those of its `tables` of choices."""
    settled = [id(statement) for name in tables for statement in module.definitions.get(name, ())]
    found = [*module.does]
    found += [s for s, chain in module.constructs if _any_of(sources, module, chain, modules.registers_itself)]
    for statements in module.definitions.values():
        for statement in statements:
            if isinstance(statement, ast.ClassDef) and _is_hooked(sources, module, statement):
                found.append(statement)
    unique = {id(statement): statement for statement in found if id(statement) not in settled}
    return sorted(unique.values(), key=lambda statement: statement.lineno)


def _is_hooked(sources: Sources, module: Module, statement: ast.ClassDef) -> bool:
    return any(_any_of(sources, module, base, modules.hooks_subclasses) for base in _bases(statement))


def _any_of(sources: Sources, module: Module, chain: tuple[str, ...], test: Callable[[ast.stmt], bool]) -> bool:
    """Whether the class that `chain` names, or one that it derives from, passes the test."""
    return any(test(statement) for _, statement in _ancestry(sources, module, chain))


def _ancestry(sources: Sources, module: Module, chain: tuple[str, ...]) -> Iterator[tuple[Module, ast.ClassDef]]:
    """The first-party classes among what `chain` names and what it derives from."""
    seen: set[int] = set()
    waiting = [(module, chain)]
    while waiting:
        for place, statement in _classes(sources, *waiting.pop()):
            if id(statement) not in seen:
                seen.add(id(statement))
                yield place, statement
                waiting.extend((place, base) for base in _bases(statement))


def _classes(
    sources: Sources, module: Module, chain: tuple[str, ...], depth: int = 0
) -> Iterator[tuple[Module, ast.ClassDef]]:
    if not chain or depth > _MOST_HOPS:
        return
    for statement in module.definitions.get(chain[0], ()):
        if isinstance(statement, ast.ClassDef):
            yield module, statement
    for target in module.imports.get(chain[0], ()):
        full = (*([target.name] if target.name else []), *chain[1:])
        place = target.module
        while full and sources.module(f"{place}.{full[0]}") is not None:
            place, full = f"{place}.{full[0]}", full[1:]
        if (inner := sources.module(place)) is not None:
            yield from _classes(sources, inner, full, depth + 1)


def is_configuration(sources: Sources, module: Module, statement: ast.ClassDef) -> bool:
    classes = [(module, statement)]
    classes += [found for base in _bases(statement) for found in _ancestry(sources, module, base)]
    return any(
        Target(*CONFIGURATION) in place.imports.get(base[0], ())
        or (base == (CONFIGURATION[1],) and place.name == CONFIGURATION[0])
        for place, found in classes
        for base in _bases(found)
    )


def _bases(statement: ast.ClassDef) -> Iterator[tuple[str, ...]]:
    for base in statement.bases:
        chain = syntax.chain_of(base.value if isinstance(base, ast.Subscript) else base)
        if chain:
            yield chain
