"""The definitions that a stage body reaches by name.

From the body the walk follows names through functions, classes, constants and imports, in the sources; nothing is
executed. Where a name cannot be followed it takes more, never less:

- Importing a module runs its statements, so of every module that is imported on the way (imports for type checkers
  left out) those statements count that do something: calls, assignments to parts of things, branches, loops, decorators
  of unknown effect, objects that may register themselves.
- A module used as a value (`getattr(module, name)`), a star import, a name that a module does not bind, `globals()`,
  `eval` or `__file__` count as the whole module.
- Text that names a module ("quant.methods.gptq:gptq_blocks") counts as that name, text that begins a module's name
  ("quant.methods.") as the package, text that names a file beside the module as that file. An import whose module's
  name is computed counts as what the texts of its file name; if they name none, as the package.
- A table of choices counts as a whole, unless the stage declares which entry a configuration takes (`choices`).

Fields and validators of configuration classes do not count: what they give stands in the key. Templates beside a module
count. How a stage is run (`INFRASTRUCTURE`) does not.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping

from artifacts import classes, counted, modules, syntax
from artifacts.classes import Sources
from artifacts.keys import digest
from artifacts.modules import FIRST_PARTY, Module, Target
from artifacts.syntax import Function, References

TEMPLATE_SUFFIXES = (".j2", ".jinja")  # templates beside a module are code too
STATEMENTS = "module statements"

_MODULE_TEXT = re.compile(rf"({'|'.join(FIRST_PARTY)})(\.\w+)+(:\w+)?")
_PACKAGE_TEXT = re.compile(rf"(({'|'.join(FIRST_PARTY)})(\.\w+)*)\.")
_ABOUT_MODULES = frozenset({"__name__", "__doc__", "__package__", "__version__"})


class Walk:
    """One walk from a definition; `found` holds full digests."""

    def __init__(self, sources: Sources, choices: Mapping[str, str]) -> None:
        self.sources, self.choices = sources, choices
        self.scripts: set[str] = set()
        """Names of modules whose files are run by other processes, or read."""
        self.found: dict[str, dict[str, str]] = {}
        self._reached: set[tuple[str, str]] = set()
        self._followed: set[tuple[Target, tuple[str, ...]]] = set()
        self._loaded: set[str] = set()
        self._whole: set[str] = set()
        self._pending: list[tuple[Module, References]] = []
        self._importers: dict[str, Module] = {}
        """Modules that import a module by a computed name."""
        self._naming: set[str] = set()
        """Names of modules whose texts name modules."""

    def finish(self) -> None:
        """Follow what is still to be followed, then add the templates beside what was found."""
        while self._pending or self._importers:
            while self._pending:
                self._follow_references(*self._pending.pop())
            if self._importers:
                name, module = self._importers.popitem()
                if name not in self._naming:
                    self._everything_in(module.package)
        for module in filter(None, list(self.sources.known.values())):
            if module.path in self.found:
                for name in modules.files_beside(module):
                    if name.endswith(TEMPLATE_SUFFIXES):
                        self._add_file(module, name)

    def reach(self, module: Module, name: str) -> None:
        """A name that a module binds."""
        if (module.name, name) in self._reached:
            return
        self._reached.add((module.name, name))
        self.load(module.name)
        if statements := module.definitions.get(name):
            chosen = self.choices.get(f"{module.name}:{name}")
            label = f"{_kind(statements[-1])} {name}" + (f"[{chosen}]" if chosen else "")
            self._add(module, label, statements, chosen)
        if targets := module.imports.get(name):
            text = "; ".join(f"{target.module}:{target.name or ''}" for target in targets)
            self._note(module, f"import {name}", digest(text))

    def load(self, name: str) -> None:
        """What importing a module runs: that of its packages and of what it imports too."""
        waiting = [name]
        while waiting:
            name = waiting.pop()
            if not name or name in self._loaded:
                continue
            self._loaded.add(name)
            waiting.append(name.rpartition(".")[0])
            module = self.sources.module(name)
            if module is not None:
                waiting.extend(module.loads)
                tables = [name for name in module.definitions if f"{module.name}:{name}" in self.choices]
                if does := classes.done_by(self.sources, module, tables):
                    self._add(module, STATEMENTS, does)

    def whole(self, module: Module) -> None:
        """Everything in a module."""
        if module.name in self._whole:
            return
        self._whole.add(module.name)
        self.load(module.name)
        for name in [*module.definitions, *module.imports]:
            self.reach(module, name)
            for target in module.imports.get(name, ()):
                if self.sources.module(target.module) is not None and self.sources.submodule(target) is None:
                    self.follow(target, ())
        self._stars(module)
        if module.is_package and not module.definitions:  # a package used as a value: its modules may be meant
            self._everything_in(module.name)

    def follow(self, target: Target, rest: tuple[str, ...]) -> None:
        """What `target.rest` stands for."""
        if (target, rest) in self._followed:
            return
        self._followed.add((target, rest))
        module = self.sources.module(target.module)
        if target.name is None:
            self._follow_module(target.module, module, rest)
        elif module is not None and module.knows(target.name):
            self.reach(module, target.name)
            for further in module.imports.get(target.name, ()):
                self.follow(further, rest)
        elif (inner := self.sources.submodule(target)) is not None:
            self.load(inner.name)
            self.follow(Target(inner.name), rest)
        elif module is not None:
            self.whole(module)

    def _follow_module(self, name: str, module: Module | None, rest: tuple[str, ...]) -> None:
        if module is None:  # a folder without __init__.py, infrastructure, or of others
            if rest and self.sources.root.joinpath(*name.split(".")).is_dir():
                self.follow(Target(f"{name}.{rest[0]}"), rest[1:])
        elif not rest:
            self.whole(module)
        elif rest[0] == "__file__":
            self._script(module)
        elif rest[0] not in _ABOUT_MODULES:
            self.follow(Target(name, rest[0]), rest[1:])

    def _script(self, module: Module) -> None:
        self.scripts.add(module.name)
        self.whole(module)

    def _follow_references(self, module: Module, references: References) -> None:
        local: dict[str, list[Target]] = {}
        for statement in references.imports:
            for name in modules.loaded_by(statement, module.package):
                self.load(name)
            for name, target in modules.imported(statement, module.package):
                local.setdefault(name, []).append(target)
                if target.name == "*":
                    self.follow(Target(target.module), ())
                elif target.name is not None and self.sources.submodule(target) is None:
                    self.follow(target, ())
        for name, *rest in references.chains:
            for target in (*local.get(name, ()), *module.imports.get(name, ())):
                self.follow(target, tuple(rest))
            if module.knows(name):
                self.reach(module, name)
            elif name not in local:
                self._stars(module)
        if references.looks_up:
            self.whole(module)
        if any(chain[0] == "__file__" for chain in references.chains):
            self._script(module)
        if any([self._follow_text(module, text) for text in references.strings]):
            self._naming.add(module.name)
        if references.imports_by_text:
            self._importers[module.name] = module

    def _follow_text(self, module: Module, text: str) -> bool:
        """Whether the text names something; a file beside the module counts as well."""
        if _MODULE_TEXT.fullmatch(text):
            place, _, name = text.partition(":")
            if self.sources.module(place) is None and not name:
                place, _, name = place.rpartition(".")
            if self.sources.module(place) is not None:
                self.load(place)
                self.follow(Target(place, name or None), ())
                return True
        elif match := _PACKAGE_TEXT.fullmatch(text):
            self._everything_in(match[1])
            return True
        elif "." in text and text in modules.files_beside(module):
            beside = (
                self.sources.module(f"{module.package}.{text.removesuffix('.py')}") if text.endswith(".py") else None
            )
            if beside is not None:
                self._script(beside)
            elif not text.endswith(".py") and (module.folder / text).is_file():
                self._add_file(module, text)
        return False

    def _everything_in(self, package: str) -> None:
        folder = self.sources.root.joinpath(*package.split("."))
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(self.sources.root).with_suffix("").parts
            if (
                inner := self.sources.module(".".join(parts).removesuffix(".__init__"))
            ) is not None and inner.name != package:
                self.whole(inner)

    def _stars(self, module: Module) -> None:
        for name in module.stars:
            if (star := self.sources.module(name)) is not None:
                self.whole(star)

    def _add(self, module: Module, label: str, statements: list[ast.stmt], chosen: str | None = None) -> None:
        kept = [self._counted(module, statement, chosen) for statement in statements]
        state = (label, chosen, *((id(old), old is new) for old, new in zip(statements, kept, strict=True)))
        if state not in module.digests:
            module.digests[state] = syntax.read(kept)
        value, references = module.digests[state]
        self._note(module, label, value)
        self._pending.append((module, references))

    def _counted(self, module: Module, statement: ast.stmt, chosen: str | None) -> ast.stmt:
        """What of a definition counts."""
        if chosen is not None:
            return counted.narrowed(statement, chosen)
        if isinstance(statement, ast.ClassDef) and classes.is_configuration(self.sources, module, statement):
            return counted.without_fields(statement)
        if isinstance(statement, Function) and statement.decorator_list:
            return counted.without_declaration(statement)
        return statement

    def _add_file(self, module: Module, name: str) -> None:
        self._note(module, f"file {name}", modules.file_digest(module.folder / name))

    def _note(self, module: Module, label: str, value: str) -> None:
        self.found.setdefault(module.path, {})[label] = value


def _kind(statement: ast.stmt) -> str:
    if isinstance(statement, Function):
        return "function"
    return "class" if isinstance(statement, ast.ClassDef) else "constant"
