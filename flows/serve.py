"""`reasoning-qat serve`: server, work pool, deployments and worker in one command, all on loopback."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil
from rich.console import Console
from rich.markup import escape

from flows.access import REPOSITORY, Access, AccessFile
from flows.server import HOST, ServerError, own_server, page

POOL = "local"
STOP_SECONDS = 5.5
"""For flow runs to stop their stages."""
REPORT_SECONDS = 1.0
"""For a worker to tell the server of flow runs that have ended; and then to end itself."""


def serve(port: int, console: Console) -> None:
    """Run until Ctrl-C or SIGTERM.  Raises ServerError when a step fails, or another `serve` is up."""
    file = AccessFile()
    proxied = bool(urllib.request.getproxies()) and not urllib.request.proxy_bypass(HOST)
    with file.serving() as free:
        if not free:
            running = file.read()
            where = f"at {page(running.url)}" if running else "and has not written its address yet"
            raise ServerError(f"`reasoning-qat serve` is up in this folder already, {where}; end it first")
        with own_server(port, file.password()) as (ready, access):
            ready()
            environment = {**os.environ, "REASONING_QAT_HOME": str(REPOSITORY)}
            environment.pop("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", None)  # a worker tells what it does
            _prefect(environment, "work-pool", "create", POOL, "--type", "process", "--overwrite")
            _prefect(environment, "--no-prompt", "deploy", "--all")
            file.write(access)
            _tell(access, file, console, proxied)
            _work(environment)


def _tell(access: Access, file: AccessFile, console: Console, proxied: bool) -> None:
    own = Path(sys.executable).with_name("prefect")
    inside = own.is_relative_to(REPOSITORY)
    typed = "prefect" if shutil.which("prefect") == str(own) else str(own.relative_to(REPOSITORY) if inside else own)
    if proxied:
        typed = f"no_proxy={HOST} {typed}"
    console.print(
        f"Prefect UI: {page(access.url)}   (Ctrl-C ends server and worker)\n"
        f"its password: {escape(access.password)}   (kept in {file.path.relative_to(REPOSITORY)})\n"
        f"in another terminal, in {escape(str(REPOSITORY))}: {typed} deployment run reasoning-qat/full --watch",
        highlight=False,
        soft_wrap=True,
    )


def _work(environment: dict[str, str]) -> None:
    """Run a worker until it ends; an exception that comes meanwhile ends it and its flow runs."""
    command = ["-m", "flows.prefect_process", str(os.getpid()), "worker", "start", "--pool", POOL, "--name", "local"]
    worker = subprocess.Popen(
        [sys.executable, *command], env=environment, cwd=REPOSITORY, stdin=subprocess.DEVNULL, start_new_session=True
    )
    try:
        raise ServerError(f"the worker ended with exit code {worker.wait()}")
    finally:
        _stop(psutil.Process(worker.pid) if worker.poll() is None else None)
        worker.wait()


def _stop(worker: psutil.Process | None) -> None:
    """Flow runs first, while the worker and the server still hear of it."""
    if worker is None:
        return
    flow_runs, family = worker.children(), worker.children(recursive=True)
    if flow_runs:
        _terminate(flow_runs, STOP_SECONDS)
        time.sleep(REPORT_SECONDS)
    _terminate([worker], REPORT_SECONDS)
    for process in [*family, worker]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _terminate(processes: list[psutil.Process], seconds: float) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    psutil.wait_procs(processes, timeout=seconds)


def _prefect(environment: dict[str, str], *arguments: str) -> None:
    command = [sys.executable, "-m", "prefect", *arguments]
    done = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if done.returncode:
        last = f"{done.stdout}{done.stderr}".strip().splitlines()[-1:]
        raise ServerError(f"prefect {' '.join(arguments)} failed: {''.join(last)[:200]}")
