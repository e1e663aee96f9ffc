"""A run that is killed, stopped or interrupted in a training stage, then the same command: the same result."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

COMMAND = [sys.executable, "-m", "flows.cli", "run", "tiny_w2g128", "--branch", "*Reasoning*", "--jobs", "1"]
SETTINGS = {
    "calibrate.num_sequences": 16,
    "calibrate.generation.max_new_tokens": 16,
    "train_data.num_examples": 64,
    "kd_train.steps": 40,
    "kd_train.warmup_steps": 1,
    "kd_train.batch_size": 8,
    "kd_train.micro_batch_size": 8,
    "kd_train.checkpoint_every": 2,
    "rl_data.num_examples": 32,
    "grpo_train.steps": 12,
    "grpo_train.warmup_steps": 1,
    "grpo_train.batch_size": 16,
    "grpo_train.micro_batch_size": 16,
    "grpo_train.generation.max_new_tokens": 24,
    "grpo_train.checkpoint_every": 1,
}
KILL_TIMEOUT_S = 300
STOP_TIMEOUT_S = 10


def command() -> list[str]:
    sets = [part for key, value in SETTINGS.items() for part in ("--set", f"{key}={value}")]
    return [*COMMAND, *sets, "--until", "grpo_train"]


def environment(store: Path) -> dict[str, str]:
    variables = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")}
    return {**variables, "REASONING_QAT_STORE": str(store)}


def run_to_end(store: Path) -> None:
    subprocess.run(command(), env=environment(store), check=True, capture_output=True, timeout=KILL_TIMEOUT_S)


def records(store: Path) -> dict[str, dict]:  # type: ignore[type-arg]
    found = [json.loads(p.read_text()) for p in (store / "records").glob("*.json")]
    return {r["payload"]["stage"]: r for r in found}


def progress(store: Path, unit_total: int) -> int:
    """Steps done of the running stage that has `unit_total` of them."""
    states = [json.loads(file.read_text()) for file in (store / "work").glob("*/progress-*.json")]
    return max((int(state["done"]) for state in states if state.get("total") == unit_total), default=0)


def start(store: Path, **more: str) -> subprocess.Popen[str]:
    variables = {**environment(store), **more}
    return subprocess.Popen(
        command(), env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=_interruptible
    )


def _interruptible() -> None:
    """A job in the background of a shell, as this test may be one, is born deaf to SIGINT, and so are its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_until(process: subprocess.Popen[str], reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + KILL_TIMEOUT_S
    while not reached():
        assert process.poll() is None, f"ended before: {process.communicate()[0]}"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def end(process: subprocess.Popen[str], number: signal.Signals) -> str:
    """Signal the run; returns what it had printed, once it and all that it started have ended."""
    children = psutil.Process(process.pid).children(recursive=True)
    assert children
    started = time.monotonic()
    process.send_signal(number)
    printed, _ = process.communicate(timeout=KILL_TIMEOUT_S)
    if number != signal.SIGKILL:
        assert time.monotonic() - started < STOP_TIMEOUT_S
    _, left = psutil.wait_procs(children, timeout=30 if number == signal.SIGKILL else 1)
    # A container without an init reaps nobody's children.
    alive = [process for process in left if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    assert not alive, "workers and server end with the run"
    return printed


SAID = {signal.SIGTERM: (143, "stopped;"), signal.SIGINT: (130, "interrupted;"), signal.SIGKILL: (-9, "")}


def run_and_end(store: Path, number: signal.Signals, total: int, at: int) -> None:
    """Start the command and end it once the stage of `total` steps has done `at` of them."""
    process = start(store)
    wait_until(process, lambda: progress(store, total) >= at)
    printed = end(process, number)
    code, said = SAID[number]
    assert process.returncode == code and said in printed and "Traceback" not in printed, printed


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_that_is_ended_resumes_and_gives_the_same_digests(tmp_path: Path) -> None:
    disturbed, undisturbed = tmp_path / "disturbed", tmp_path / "undisturbed"
    for number, at in ((signal.SIGKILL, 6), (signal.SIGTERM, 13), (signal.SIGINT, 20)):
        run_and_end(disturbed, number, SETTINGS["kd_train.steps"], at)
        assert "kd_train" not in records(disturbed)
        checkpoints = [path for path in (disturbed / "work").glob("*/*") if path.is_dir()]
        assert checkpoints, "the stage left a checkpoint to resume from"
    for number, at in ((signal.SIGKILL, 2), (signal.SIGTERM, 4)):
        run_and_end(disturbed, number, SETTINGS["grpo_train.steps"], at)
        assert "kd_train" in records(disturbed) and "grpo_train" not in records(disturbed)
    last = start(disturbed)
    wait_until(last, lambda: progress(disturbed, SETTINGS["grpo_train.steps"]) >= 6)
    [server] = [p for p in psutil.Process(last.pid).children() if "flows.prefect_process" in " ".join(p.cmdline())]
    server.kill()
    printed, _ = last.communicate(timeout=KILL_TIMEOUT_S)
    assert last.returncode == 0 and "server ended" in printed and "Traceback" not in printed, printed
    run_to_end(undisturbed)
    ours, theirs = records(disturbed), records(undisturbed)
    for stage in ("calibrate", "ptq_init", "kd_train", "grpo_train"):
        assert ours[stage]["ref"] == theirs[stage]["ref"], stage
    assert not list((disturbed / "tmp").glob(".tmp-*/*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_is_ended_while_it_starts(tmp_path: Path, number: signal.Signals) -> None:
    process = start(tmp_path)
    wait_until(process, lambda: (tmp_path / "prefect" / "server.log").exists())
    time.sleep(0.3)
    printed = end(process, number)
    assert process.returncode == SAID[number][0] and SAID[number][1] in printed and "Traceback" not in printed, printed
