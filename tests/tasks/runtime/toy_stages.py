"""Two small stages for the tests of caching and execution: cheap, and they count how often they run."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import ClassVar, Literal

from artifacts import scratch
from tasks.runtime.processes import stop_requested
from tasks.runtime.stage import Context, Metrics, StageConfig, StageError, stage


class SourceConfig(StageConfig):
    text: str = "hello"
    runs: str = ""
    """A file that gets a line per execution."""


@stage(kind="text")
def source(config: SourceConfig, context: Context) -> Metrics:
    if config.runs:
        with Path(config.runs).open("a") as log:
            log.write("source\n")
    (context.output / "text.txt").write_text(config.text)
    return {"length": len(config.text)}


class UpperConfig(StageConfig):
    num_steps: int = 3
    stop_at: int | None = None
    """Kill the process, as kill -9 does, before this step of the first attempt; enters no key."""
    fail: str = ""
    seconds: float = 0.0
    patience: float = 1.0
    """Enters no key."""
    starts: str = ""
    """A file for the id of a process that the stage starts and would leave behind."""
    on_stop: Literal["dies", "saves", "ignores"] = "dies"

    unkeyed_fields: ClassVar[tuple[str, ...]] = ("patience", "stop_at")


@stage(kind="text")
def upper(config: UpperConfig, context: Context, *, text: Path, more: Path | None = None) -> Metrics:
    if config.fail == "mend":
        raise StageError("the remedy is to set fail=''")
    if config.fail == "disk":
        raise OSError(28, "No space left on device")
    if config.fail == "bug":
        raise ZeroDivisionError("a bug")
    if config.on_stop == "ignores":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if config.starts:
        Path(config.starts).write_text(str(subprocess.Popen(["sleep", "600"]).pid))
    with stop_requested() if config.on_stop == "saves" else nullcontext(lambda: False) as stopping:
        resumed_from = _steps(config, context, stopping)
    steps = (context.scratch / "steps" / "text.txt").read_text()
    (context.telemetry / "measured.txt").write_text(f"{resumed_from} {time.time_ns()} {context.input_digests['text']}")
    (context.output / "text.txt").write_text((text / "text.txt").read_text().upper() + steps)
    return {"resumed_from": resumed_from}


def _steps(config: UpperConfig, context: Context, stopping: Callable[[], bool]) -> int:
    done = context.scratch / "steps"
    steps = (done / "text.txt").read_text() if scratch.is_sound(done) else ""
    resumed_from = len(steps)
    for step in range(resumed_from, config.num_steps):
        if step == config.stop_at and resumed_from == 0:
            os.kill(os.getpid(), 9)
        time.sleep(config.seconds)
        steps += "x"
        with scratch.writing(done) as inside:
            (inside / "text.txt").write_text(steps)
        context.progress(step + 1, config.num_steps, loss=1.0 / (step + 1))
        if stopping():
            (context.scratch / "saved").touch()
            raise StageError("stopped")
    return resumed_from
