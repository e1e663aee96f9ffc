"""The code of a stage: every edit of what it reaches changes its digest, an edit of anything else does not."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from artifacts.code import Code, Entry, changed, code_of
from artifacts.keys import REPOSITORY
from artifacts.loaded import loaded_sources, record

sys.path.insert(0, str(Path(__file__).parent))
from code_cases import CASES

GOLDEN = json.loads((Path(__file__).parent / "golden" / "code.json").read_text())


def write(root: Path, **files: str) -> Path:
    """A tree of sources: `tasks__stage` is tasks/stage.py, `tasks____init__` is tasks/__init__.py."""
    for name, text in files.items():
        package = name.removesuffix("____init__")
        path = root / (package.replace("__", "/") + ("/__init__.py" if package != name else ".py"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def code(root: Path, **entry: Any) -> Code:
    return code_of(Entry("tasks.stage", "body", **entry), root)


def digest(root: Path, stage: str, entry: dict[str, Any] | None = None, **others: str) -> str:
    return code(write(root, **{**EMPTY, "tasks__stage": stage, **others}), **(entry or {})).digest


EMPTY = {"tasks____init__": "", "quant____init__": ""}
BY_NAME = {case.name: {**EMPTY, **case.sources} for case in CASES}
EDITS = [(case.name, *edit, True) for case in CASES for edit in case.matter]
EDITS += [(case.name, *edit, False) for case in CASES for edit in case.do_not]


@pytest.mark.parametrize("case, file, old, new, matters", EDITS, ids=lambda part: str(part)[:30])
def test_edits(tmp_path: Path, case: str, file: str, old: str, new: str, matters: bool) -> None:
    sources = BY_NAME[case]
    before = code(write(tmp_path / "a", **sources))
    assert old in sources[file]
    edited = {**sources, file: sources[file].replace(old, new) if old else new}
    after = code(write(tmp_path / "b", **edited))
    assert (after.digest != before.digest) == matters
    assert (after.definitions != before.definitions) == matters


@pytest.mark.parametrize("case", BY_NAME)
def test_words_and_layout_never_count(tmp_path: Path, case: str) -> None:
    sources = BY_NAME[case]
    worded = {}
    for name, text in sources.items():
        lines = [line + "  # why" if line.strip() else line for line in text.splitlines()]
        worded[name] = (
            '"""Words."""\n\n\n' + "\n".join(lines).replace("\n\ndef ", "\n'Of what is above.'\n\n\ndef ") + "\n"
        )
    assert code(write(tmp_path / "a", **sources)).digest == code(write(tmp_path / "b", **worded)).digest


DOCUMENTED = '''"""Module."""
import quant.m

K = 1
"""Of a constant."""


class C:
    """Of a class."""

    x: int = 1
    """Of an attribute."""

    def f(self):
        """Of a method."""
        return self.x


def body(c):
    """Of a function."""
    if c:
        """In a branch."""
        pass
    return C, K
'''


def test_docstrings_of_every_kind_are_words(tmp_path: Path) -> None:
    other = DOCUMENTED.replace("Of", "About").replace("In a", "Inside a").replace("Module", "File")
    bare = "".join(line for line in DOCUMENTED.splitlines(keepends=True) if '"""' not in line)
    digests = {digest(tmp_path / str(i), text, quant__m="") for i, text in enumerate((DOCUMENTED, other, bare))}
    assert len(digests) == 1
    assert (
        digest(tmp_path / "x", DOCUMENTED.replace("return C, K", 'return C, K, """text"""'), quant__m="") not in digests
    )


TABLE = "from quant.a import a\nfrom quant.b import b\n\nTABLE: dict = {'a': a, 'b': b}\n"
CHOICE = {
    "quant__table": TABLE,
    "quant__a": "def a():\n    return 1\n",
    "quant__b": "def b():\n    return 2\n",
}
STAGE = "from quant.table import TABLE\n\ndef body(c):\n    return TABLE[c.name]()\n"
TAKES_A = {"choices": (("quant.table:TABLE", "a"),)}


@pytest.mark.parametrize(
    "entry, edit, matters",
    [
        ({}, {"quant__b": "def b():\n    return 20\n"}, True),
        (TAKES_A, {"quant__b": "def b():\n    return 20\n"}, False),
        (TAKES_A, {"quant__a": "def a():\n    return 10\n"}, True),
        (TAKES_A, {"quant__table": TABLE.replace("'a': a", "'a': b")}, True),
        (TAKES_A, {"quant__table": TABLE.replace("'b': b", "'c': b")}, False),
        (TAKES_A, {"quant__b": "print(1)\n\ndef b():\n    return 2\n"}, True),
        ({"choices": (("quant.table:TABLE", "none"),)}, {"quant__b": "def b():\n    return 20\n"}, True),
    ],
    ids=["undeclared", "other entry", "own entry", "entry", "table", "import of the other", "no such entry"],
)
def test_a_declared_choice_leaves_the_other_entries_out(
    tmp_path: Path, entry: dict[str, Any], edit: dict[str, str], matters: bool
) -> None:
    before = digest(tmp_path / "a", STAGE, entry, **CHOICE)
    assert (digest(tmp_path / "b", STAGE, entry, **{**CHOICE, **edit}) != before) == matters


def test_choices_and_classes_are_told_apart(tmp_path: Path) -> None:
    chosen = [digest(tmp_path / "a", STAGE, {"choices": (("quant.table:TABLE", name),)}, **CHOICE) for name in "ab"]
    assert chosen[0] != chosen[1]


CONFIGURED = """from typing import ClassVar
from pydantic import Field, field_validator
from tasks.runtime.stage import StageConfig, stage

class Base(StageConfig):
    size: int = Field(default=1, gt=0)
    LIMIT: ClassVar[int] = 5
    unkeyed_fields: ClassVar[tuple] = ()
    hidden: int = Field(default=1, exclude=True)

    @field_validator("size")
    def _even(cls, value):
        return value

class Config(Base):
    def doubled(self):
        return 2 * self.size

@stage(kind="x", packages=lambda config: ("torch",))
def body(config, context):
    return config.doubled()
"""


@pytest.mark.parametrize(
    "old, new, matters",
    [
        ("default=1, gt=0", "default=2, gt=1", False),
        ("        return value", "        return max(value, 1)", False),
        ('("torch",)', '("vllm",)', False),
        ("unkeyed_fields: ClassVar[tuple] = ()", 'unkeyed_fields: ClassVar[tuple] = ("size",)', False),
        ("2 * self.size", "3 * self.size", True),
        ("ClassVar[int] = 5", "ClassVar[int] = 6", True),
        ('kind="x"', 'kind="y"', True),
        ("default=1, exclude", "default=2, exclude", True),
    ],
)
def test_configuration_classes_count_by_what_is_not_in_the_key(
    tmp_path: Path, old: str, new: str, matters: bool
) -> None:
    runtime = {"tasks__runtime__stage": "class StageConfig: pass\n\ndef stage(**more): return lambda f: f\n"}
    entry = {"also": (("tasks.stage", "Config"),)}
    before = digest(tmp_path / "a", CONFIGURED, entry, **runtime)
    assert old in CONFIGURED
    assert (digest(tmp_path / "b", CONFIGURED.replace(old, new), entry, **runtime) != before) == matters


def test_templates_beside_a_reached_module_count(tmp_path: Path) -> None:
    before = digest(tmp_path, STAGE, **CHOICE)
    (tmp_path / "quant" / "page.j2").write_text("{{ question }}")
    assert digest(tmp_path, STAGE, **CHOICE) != before


def test_an_edit_in_the_same_process_is_seen(tmp_path: Path) -> None:
    before = digest(tmp_path, STAGE, **CHOICE)
    assert digest(tmp_path, STAGE, **{**CHOICE, "quant__a": "def a():\n    return 7\n"}) != before
    assert digest(tmp_path, STAGE, **CHOICE) == before


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    write(tmp_path, tasks__stage=STAGE)
    for entry in (Entry("tasks.nothing", "body"), Entry("tasks.stage", "nobody")):
        with pytest.raises(ValueError, match="no '"):
            code_of(entry, tmp_path)


@pytest.mark.parametrize("case", GOLDEN)
def test_golden_code(tmp_path: Path, case: str) -> None:
    """Digests change by an edit of what they digest, or on purpose with this file; never with a Python version."""
    sources = BY_NAME[case]
    assert code(write(tmp_path, **sources)).digest == GOLDEN[case]


def test_what_was_loaded_is_told_from_what_the_file_holds_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Edited, imported and edited back: the file is the old one again, the process has the new code."""
    monkeypatch.setattr("artifacts.loaded.FIRST_PARTY", ("loaded_room",))
    monkeypatch.syspath_prepend(str(tmp_path))
    stage = "from loaded_room.m import f\n\ndef body(c):\n    return f(c)\n"
    sources = {"loaded_room____init__": "", "loaded_room__stage": stage, "loaded_room__m": "def f(x):\n    return 1\n"}
    entry = Entry("loaded_room.stage", "body")
    before = code_of(entry, write(tmp_path, **sources))
    write(tmp_path, loaded_room__m="def f(x):\n    return 2\n")
    record()
    module = importlib.import_module("loaded_room.stage")
    write(tmp_path, **sources)
    try:
        assert module.body(0) == 2 and code_of(entry, tmp_path) == before
        assert changed(before, entry, loaded_sources(), tmp_path) == ["loaded_room/m.py: function f"]
        assert changed(before, entry, {}, tmp_path) == []
    finally:
        for name in ("loaded_room", "loaded_room.stage", "loaded_room.m"):
            sys.modules.pop(name, None)


def test_an_edit_after_the_import_is_no_change(tmp_path: Path) -> None:
    sources = {"tasks____init__": "", "tasks__stage": "def body(c):\n    return 1\n"}
    entry = Entry("tasks.stage", "body")
    before = code_of(entry, write(tmp_path, **sources))
    write(tmp_path, tasks__stage="def body(c):\n    return 2\n")
    loaded = {"tasks.stage": sources["tasks__stage"].encode()}
    assert changed(before, entry, loaded, tmp_path) == []
    assert changed(before, entry, {}, tmp_path) == ["tasks/stage.py: function body"]


def test_files_that_other_processes_run_are_compared_as_they_are_now(tmp_path: Path) -> None:
    sources = {
        "quant____init__": "",
        "quant__driver": "def main():\n    return 1\n",
        "tasks__stage": "from quant import driver\n\ndef body(c):\n    return driver.__file__\n",
    }
    entry = Entry("tasks.stage", "body")
    before = code_of(entry, write(tmp_path, **sources))
    loaded = {"quant.driver": sources["quant__driver"].encode()}
    write(tmp_path, quant__driver="def main():\n    return 2\n")
    assert changed(before, entry, loaded, tmp_path) == ["quant/driver.py: function main"]


def test_byte_code_of_an_edit_within_a_second_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("artifacts.loaded.FIRST_PARTY", ("quick_room",))
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    monkeypatch.syspath_prepend(str(tmp_path))
    record()
    for value in (1, 2, 3):
        write(tmp_path, quick_room__m=f"VALUE = {value}\n")
        importlib.invalidate_caches()
        try:
            module = importlib.import_module("quick_room.m")
            assert value == module.VALUE
        finally:
            sys.modules.pop("quick_room.m", None)
            sys.modules.pop("quick_room", None)


def test_this_process_recorded_what_it_imported() -> None:
    importlib.import_module("tasks.data.prompts")
    assert loaded_sources()["tasks.data.prompts"] == (REPOSITORY / "tasks" / "data" / "prompts.py").read_bytes()
