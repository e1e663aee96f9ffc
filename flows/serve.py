"""`reasoning-qat serve`: server, work pool, deployments and worker in one command, all on loopback."""

from __future__ import annotations

import os
import subprocess
import sys

from rich.console import Console

from flows.server import REPOSITORY, ServerError, end_with_parent, own_server, stop

POOL = "local"


def serve(port: int, console: Console) -> None:
    """Run until Ctrl-C.  Raises ServerError when a step fails."""
    with own_server(port) as ready:
        url = ready()
        environment = {**os.environ, "PREFECT_API_URL": url, "REASONING_QAT_HOME": str(REPOSITORY)}
        environment.pop("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", None)  # a worker tells what it does
        _prefect(environment, "work-pool", "create", POOL, "--type", "process", "--overwrite")
        _prefect(environment, "--no-prompt", "deploy", "--all")
        console.print(f"Prefect UI: {url.removesuffix('/api')}   (Ctrl-C ends server and worker)")
        console.print("in another terminal: prefect deployment run reasoning-qat/full --watch")
        worker = subprocess.Popen(
            [sys.executable, "-m", "prefect", "worker", "start", "--pool", POOL, "--name", "local"],
            env=environment,
            cwd=REPOSITORY,
            preexec_fn=end_with_parent,
        )
        try:
            if code := worker.wait():
                raise ServerError(f"the worker ended with exit code {code}")
        finally:
            stop(worker)


def _prefect(environment: dict[str, str], *arguments: str) -> None:
    command = [sys.executable, "-m", "prefect", *arguments]
    done = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ServerError(f"prefect {' '.join(arguments)} failed:\n{done.stdout}{done.stderr}")
