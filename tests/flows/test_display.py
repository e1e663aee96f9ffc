"""What a person sees of a stage that stalls, waits or fails, on a terminal and elsewhere."""

from __future__ import annotations

import io
import logging

import pytest
from rich.console import Console

from artifacts.refs import Ref
from flows.display import RunDisplay
from tasks.runtime.execute import Outcome


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
def test_a_note_is_told_once_and_at_the_latest_when_the_stage_ends(terminal: bool) -> None:
    console = Console(file=io.StringIO(), width=120, force_terminal=terminal, color_system=None)
    outcome = Outcome(Ref("checkpoint", "0" * 64), False, {}, ("waits for [1]", "damaged: checkpoint-4"))
    with RunDisplay(console, num_stages=1) as display:
        for event in ({}, {"notes": ["waits for [1]"]}, {}, {"notes": ["waits for [1]"]}):
            display("kd_train [a]", {"state": "running", **event})
        display("kd_train [a]", {"state": "done", "outcome": outcome})
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert [shown.count(f"note    kd_train [a]  {note}") for note in outcome.notes] == [1, 1]


def test_damage_that_the_flow_itself_finds_is_told() -> None:
    console = Console(file=io.StringIO(), width=120, color_system=None)
    with RunDisplay(console, num_stages=1):
        logging.getLogger("artifacts.store").warning("damaged: checkpoint:%s [x]", "0123")
    logging.getLogger("artifacts.store").warning("of no run")
    assert console.file.getvalue().strip() == "note    damaged: checkpoint:0123 [x]"  # type: ignore[attr-defined]


@pytest.mark.parametrize("terminal", [True, False])
def test_a_failure_is_told_when_it_happens(terminal: bool) -> None:
    console = Console(file=io.StringIO(), width=120, force_terminal=terminal, color_system=None)
    with RunDisplay(console, num_stages=2) as display:
        display("kd_train [a]", {"state": "running"})
        display("kd_train [a]", {"state": "failed", "error": ValueError("its [log] is there")})
        assert "failed  kd_train [a]  its [log] is there" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_failed_stage_is_named_once() -> None:
    console = Console(file=io.StringIO(), width=120, color_system=None)
    with RunDisplay(console, num_stages=1) as display:
        display("kd_train [a]", {"state": "failed", "error": ValueError("kd_train [a]: not in the cache")})
    assert console.file.getvalue().strip() == "failed  kd_train [a]  not in the cache"  # type: ignore[attr-defined]
