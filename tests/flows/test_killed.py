"""kill -9 of the flow process in the middle of a training stage, then the same command: same result."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

COMMAND = [sys.executable, "-m", "flows.cli", "run", "tiny_w2g128", "--branch", "Reasoning", "--jobs", "1"]
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
    for file in (store / "work").glob("*/progress-*.json"):
        state = json.loads(file.read_text())
        if state["total"] == unit_total:
            return int(state["done"])
    return 0


def run_and_kill(store: Path, total: int, at: int) -> None:
    """Start the command and kill -9 its process once the stage of `total` steps has done `at` of them."""
    process = subprocess.Popen(command(), env=environment(store), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + KILL_TIMEOUT_S
    while progress(store, total) < at:
        assert process.poll() is None, "ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive, "workers and server die with the flow process"


@pytest.mark.slow
def test_a_killed_run_resumes_and_ends_with_the_same_digests(tmp_path: Path) -> None:
    disturbed, undisturbed = tmp_path / "disturbed", tmp_path / "undisturbed"
    run_and_kill(disturbed, total=SETTINGS["kd_train.steps"], at=6)
    assert "kd_train" not in records(disturbed)
    run_and_kill(disturbed, total=SETTINGS["grpo_train.steps"], at=2)
    assert "kd_train" in records(disturbed) and "grpo_train" not in records(disturbed)
    checkpoints = [p for p in (disturbed / "work").glob("*/*") if p.is_dir()]
    assert checkpoints, "the killed stage left a checkpoint to resume from"
    run_to_end(disturbed)
    run_to_end(undisturbed)
    ours, theirs = records(disturbed), records(undisturbed)
    for stage in ("calibrate", "ptq_init", "kd_train", "grpo_train"):
        assert ours[stage]["ref"] == theirs[stage]["ref"], stage
    assert not list((disturbed / "tmp").glob(".tmp-*/*"))
