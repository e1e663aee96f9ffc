"""The Prefect server behind a run: the one that is up, or one of our own on loopback for as long as it is needed.

Must be used before Prefect is imported, because Prefect reads its settings then.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

from artifacts.store import Store

HOST = "127.0.0.1"
DEFAULT_PORT = 4200
START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 10.0
PR_SET_PDEATHSIG = 1  # linux/prctl.h
REPOSITORY = Path(__file__).resolve().parent.parent


class ServerError(RuntimeError):
    """The Prefect server did not come up; the message names its log."""


def configure() -> None:
    """Settings that hold for every Prefect process we start: no telemetry, state beside the artifact store."""
    os.environ.setdefault("PREFECT_HOME", str(Store().root / "prefect"))
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    # A failed stage's traceback goes to its log and to the UI; the console gets the message.
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")


def api_url(port: int = DEFAULT_PORT) -> str:
    return f"http://{HOST}:{port}/api"


def is_healthy(url: str) -> bool:
    """Whether a Prefect server answers at this API address."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


@contextlib.contextmanager
def server() -> Iterator[Callable[[], str]]:
    """A live server: the one of $PREFECT_API_URL, else of `make serve`, else one started for this run.

    Yields a function that waits until it answers and returns its API address: our own server starts in the background
    meanwhile.
    """
    configure()
    url = os.environ.get("PREFECT_API_URL") or api_url()
    if is_healthy(url):
        os.environ["PREFECT_API_URL"] = url
        yield lambda: url
    elif "PREFECT_API_URL" in os.environ:
        raise ServerError(f"no Prefect server answers at PREFECT_API_URL={url}; start it, or unset the variable")
    else:
        with own_server(_free_port()) as ready:
            yield ready


@contextlib.contextmanager
def own_server(port: int) -> Iterator[Callable[[], str]]:
    """Start a server on loopback in the background and stop it afterwards; yields a function that waits for it.

    $PREFECT_API_URL names it as long as it lives.
    """
    configure()
    home = Path(os.environ["PREFECT_HOME"])
    home.mkdir(parents=True, exist_ok=True)
    log_path = home / "server.log"
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", HOST, "--port", str(port)]
    os.environ["PREFECT_API_URL"] = url = api_url(port)
    with log_path.open("ab") as log:
        process = subprocess.Popen(
            command,
            env={**os.environ, "PREFECT_UI_API_URL": url},
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=end_with_parent,
        )
    try:
        yield lambda: _wait_healthy(process, url, log_path)
    finally:
        flush_logs()
        stop(process)
        del os.environ["PREFECT_API_URL"]


def flush_logs() -> None:
    """Send what Prefect still holds of a run's log, before the server that takes it is stopped."""
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        for handler in logging.getLogger(name).handlers:
            handler.flush()


def _wait_healthy(process: subprocess.Popen[bytes], url: str, log_path: Path) -> str:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not is_healthy(url):
        if process.poll() is not None or time.monotonic() > deadline:
            raise ServerError(f"the Prefect server did not start at {url}; its log is {log_path}")
        time.sleep(0.2)
    return url


def end_with_parent() -> None:
    """In a child before exec: ask Linux for SIGTERM when the parent dies: a killed run leaves no server behind."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a child process politely, then by force."""
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])
