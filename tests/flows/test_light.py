"""Every command that computes nothing answers at once: it imports no package that takes seconds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {
    "torch", "transformers", "pandas", "pyarrow", "prefect", "lighteval", "vllm", "datasets", "matplotlib",
    "accelerate", "math_verify", "huggingface_hub", "numpy",
}  # fmt: skip
PROGRAM = """
import sys
sys.argv = ["reasoning-qat", *{arguments!r}]
from flows.cli import app
try:
    app()
except SystemExit as end:
    assert not end.code, end.code
print("LOADED", *sorted({{name.partition(".")[0] for name in sys.modules}}))
"""


def loaded(arguments: list[str], store: Path, **environment: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(arguments=arguments)],
        env={**os.environ, "REASONING_QAT_STORE": str(store), **environment},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rpartition("LOADED")[2].split())


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["recipes"], ["ls"], ["ls", "--json"]])
def test_a_command_that_computes_nothing_loads_nothing_heavy(arguments: list[str], tmp_path: Path) -> None:
    assert not loaded(arguments, tmp_path) & HEAVY


def test_a_plan_loads_numpy_alone(tmp_path: Path) -> None:
    """With which safetensors reads the headers of a model folder, 0.05 s."""
    assert loaded(["plan", "demo"], tmp_path) & HEAVY <= {"numpy"}


def test_completion_loads_nothing_heavy(tmp_path: Path) -> None:
    found = loaded(
        [], tmp_path, _REASONING_QAT_COMPLETE="complete_bash", COMP_WORDS="reasoning-qat run tin", COMP_CWORD="2"
    )
    assert not found & HEAVY
