"""What a person sees while a run goes on: one line per stage with its state, rate and time left."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from tasks.runtime.execute import Outcome


class RunDisplay:
    """Live progress bars on a terminal; elsewhere (a worker, CI) one printed line per stage that starts or ends."""

    def __init__(self, console: Console, num_stages: int) -> None:
        self._console = console
        self._num_stages = num_stages
        self._num_finished = 0
        self._lock = threading.Lock()
        self._bars: dict[str, TaskID] = {}
        self._stalled: set[str] = set()
        self._num_told: dict[str, int] = {}
        self._damage = _Telling(self._note)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[info]}"),
            console=console,
            transient=True,
        )

    def __enter__(self) -> RunDisplay:
        logging.getLogger("artifacts").addHandler(self._damage)
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        logging.getLogger("artifacts").removeHandler(self._damage)

    def __call__(self, label: str, event: dict[str, Any]) -> None:
        """Take one event of a stage, from any thread: {"state": "running" | "cached" | "done" | "failed", ...}."""
        told = str(event.get("error", "")).removeprefix(f"{label}: ")
        label = escape(label)  # a branch's name in brackets is no markup
        with self._lock:
            if event["state"] == "running":
                self._running(label, event)
            elif event["state"] == "failed":
                self._remove_bar(label)
                self._console.print(f"[red]failed[/]  {label}  [dim]{escape(told)}[/]", highlight=False)
            else:
                self._finished(label, event["state"], event["outcome"])

    def _running(self, label: str, event: dict[str, Any]) -> None:
        if label not in self._bars:
            self._bars[label] = self._progress.add_task(label, total=None, unit="", rate="", info="")
            if not self._console.is_terminal:
                self._console.print(f"[dim]start[/]   {label}")
        self._tell_notes(label, event.get("notes", []))
        if "total" in event:
            info = dict(event["info"])
            self._tell_stall(label, info.pop("stalled", ""))
            bar = self._bars[label]
            self._progress.update(
                bar, completed=event["done"], total=event["total"], unit=event["unit"], info=_info(info)
            )
            speed = next(task.speed for task in self._progress.tasks if task.id == bar)
            self._progress.update(bar, rate=f"{speed:.2g}/s" if speed else "")

    def _tell_notes(self, label: str, notes: Sequence[str]) -> None:
        """Print those that were not there when the stage last reported."""
        told = self._num_told.get(label, 0)
        for note in notes[told:]:
            self._note(f"{label}  [dim]{escape(note)}[/]")
        self._num_told[label] = max(told, len(notes))

    def _note(self, text: str) -> None:
        self._console.print(f"[yellow]note[/]    {text}", highlight=False, soft_wrap=True)

    def _tell_stall(self, label: str, message: str) -> None:
        """One line when a stage begins to stall; `message` is empty while it does not."""
        if message and label not in self._stalled:
            self._console.print(f"[yellow]stalled[/] {label}  [dim]{escape(message)}[/]", highlight=False)
        (self._stalled.add if message else self._stalled.discard)(label)

    def _finished(self, label: str, state: str, outcome: Outcome) -> None:
        self._num_finished += 1
        self._tell_notes(label, outcome.notes)
        self._remove_bar(label)
        mark = "[cyan]cached[/] " if state == "cached" else "[green]done[/]   "
        count = f"[dim]{self._num_finished}/{self._num_stages}[/]"
        self._console.print(f"{mark} {label}  [dim]{outcome.ref.kind} {outcome.ref.short}[/]  {count}", highlight=False)

    def _remove_bar(self, label: str) -> None:
        if label in self._bars:
            self._progress.remove_task(self._bars.pop(label))


class _Telling(logging.Handler):
    """Prints what the store says of damage that a look-up of this process found."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        self._tell(f"[dim]{escape(record.getMessage())}[/]")


def _info(info: dict[str, Any]) -> str:
    return "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in info.items())
