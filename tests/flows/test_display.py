"""What a person sees of a stage that stalls, on a terminal and elsewhere."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from flows.display import RunDisplay


@pytest.mark.parametrize("terminal", [True, False])
def test_a_stall_is_told_once_each_time_it_begins(terminal: bool) -> None:
    console = Console(file=io.StringIO(), width=120, force_terminal=terminal)
    event = {"state": "running", "done": 3, "total": 10, "unit": "sample"}
    with RunDisplay(console, num_stages=1) as display:
        for info in ({}, {"stalled": "no [token] for 60 s"}, {"stalled": "no [token] for 70 s"}, {}):
            display("evaluate [a]", {**event, "info": info})
        display("evaluate [a]", {**event, "info": {"stalled": "no [token] for 80 s"}})
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "no [token] for 60 s" in shown and "no [token] for 80 s" in shown
    assert "for 70 s" not in shown


@pytest.mark.parametrize("terminal", [True, False])
def test_a_failure_is_told_when_it_happens(terminal: bool) -> None:
    console = Console(file=io.StringIO(), width=120, force_terminal=terminal, color_system=None)
    with RunDisplay(console, num_stages=2) as display:
        display("kd_train [a]", {"state": "running"})
        display("kd_train [a]", {"state": "failed", "error": ValueError("its [log] is there")})
        assert "failed  kd_train [a]  its [log] is there" in console.file.getvalue()  # type: ignore[attr-defined]
