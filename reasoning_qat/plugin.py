"""The entry point that vLLM loads in every process, in whatever folder and for whatever model it runs.

Our rooms are called tasks, quant, ...: a program's own folder may hold a tasks.py, and Python would find that first.
So nothing is imported by those names unless they mean ours; a stranger's file is neither run nor broken.
"""

from __future__ import annotations

import logging
import sys
from importlib.util import find_spec
from pathlib import Path

HOME = Path(__file__).resolve().parent.parent
ROOMS = ("artifacts", "quant", "tasks")

logger = logging.getLogger(__name__)


def register() -> None:
    """Make the quantization method known to vLLM, unless a stranger's module goes by one of our names."""
    if strangers := hidden_by():
        logger.info(
            "quantization method reasoning_qat is not available: %s hides a package of it; run from another folder",
            ", ".join(strangers),
        )
        return
    from tasks.sampling.vllm_plugin import register as register_method

    register_method()


def hidden_by() -> list[str]:
    """The files that go by the name of one of our rooms and are not ours; nothing is imported to find out."""
    return [place for room in ROOMS if (place := _place(room)) != str(HOME / room / "__init__.py")]


def _place(module: str) -> str:
    loaded = sys.modules.get(module)
    if loaded is not None:
        return str(Path(getattr(loaded, "__file__", None) or "").resolve())
    spec = find_spec(module)
    return str(Path(spec.origin).resolve()) if spec is not None and spec.origin else f"(no module {module})"
