"""vLLM loads our entry point in a stranger's folder: its files are neither run nor broken by it."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PROGRAM = """
import sys
from reasoning_qat.plugin import hidden_by, register
register()
print("hidden by", hidden_by())
print("ran" if "tasks" in sys.modules and getattr(sys.modules["tasks"], "MARK", None) else "untouched")
"""


def run(folder: Path) -> str:
    command = [sys.executable, "-c", f"import sys; sys.path.append({str(REPOSITORY)!r})\n{PROGRAM}"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["tasks.py", "quant.py", "tasks/__init__.py", "artifacts/__init__.py"])
def test_a_strangers_module_of_our_name_is_neither_run_nor_broken(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("MARK = True\nprint('STRANGER RAN')\nraise SystemExit(3)\n")
    out = run(tmp_path)
    assert "STRANGER RAN" not in out and "untouched" in out
    assert str(file.resolve()) in out


def test_nothing_hides_us_elsewhere(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    (tmp_path / "tasks").mkdir()  # a folder of files, no package
    (tmp_path / "tasks" / "notes.txt").write_text("x")
    assert "hidden by []" in run(tmp_path)


def test_it_is_the_entry_point_by_which_vllm_finds_us() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["vllm.general_plugins"] == {"reasoning_qat": "reasoning_qat.plugin:register"}
    installed = [e.value for e in entry_points(group="vllm.general_plugins") if e.name == "reasoning_qat"]
    assert installed == ["reasoning_qat.plugin:register"]
