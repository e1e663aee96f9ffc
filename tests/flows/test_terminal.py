"""What data hold never commands a terminal: one console class prints, and nothing else does."""

from __future__ import annotations

import ast
import io
from pathlib import Path

import pandas as pd
import pytest
from rich.progress import Progress
from rich.table import Table

from flows.display import RunDisplay
from flows.evaluations import _print_facts
from flows.terminal import SafeConsole, visible
from tasks.reporting import tables

REPOSITORY = Path(__file__).parents[2]
ATTACKS = {
    "title": "\x1b]0;owned\x07",
    "erase": "\x1b[2J",
    "clipboard": "\x1b]52;c;ZXZpbA==\x07",
    "c1": "\x9b2J",
    "backspace": "ab\x08\x08xy",
    "return": "right\rwrong",
    "bidi": "abc\u202edef",
}


def printed(attack: str) -> str:
    out = io.StringIO()
    console = SafeConsole(file=out, force_terminal=True, width=100)
    table = Table(attack, title=attack)
    table.add_row(attack)
    console.print(table)
    console.print(tables.rich_table(pd.DataFrame({"tier": [attack]}), attack))
    console.print(attack)
    console.print_json(data={"text": attack})
    _print_facts({attack: attack}, console)
    with Progress(console=console) as progress:
        progress.advance(progress.add_task(attack, total=2))
    with RunDisplay(console, 1) as display:
        display(attack, {"state": "running", "done": 1, "total": 2, "unit": attack, "info": {"file": attack}})
    return out.getvalue()


@pytest.mark.parametrize("name", ATTACKS)
def test_no_attack_reaches_the_terminal(name: str) -> None:
    attack = ATTACKS[name]
    out = printed(attack)
    assert attack not in out
    assert attack[0] != "\x1b" or "\ufffd" in out, "it is shown, not hidden"
    assert "\x1b[" in out, "rich's own styles still are"


def test_text_is_left_as_it_is() -> None:
    text = "a\tb\nc é 漢 \U0001f600 ✓"
    assert visible(text) == text


def test_nothing_else_prints() -> None:
    """No other console, and print only where a worker writes to its log."""
    for path in [*(REPOSITORY / "flows").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("Console", "print"):
                raise AssertionError(f"{path.name}:{node.lineno} prints by itself: use flows.terminal")
