"""The data set's configuration is read by every command: it must be light."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "pandas", "pyarrow", "datasets", "huggingface_hub", "jinja2")


@pytest.mark.parametrize(
    "module", ["tasks.dataset", "tasks.data.benchmarks", "tasks.data.fields", "tasks.data.prompts"]
)
def test_importing_loads_nothing_heavy(module):
    code = f"import sys, {module}; print(*set({HEAVY!r}).intersection(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []
