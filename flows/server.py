"""The Prefect server behind a run: the one that is up, or one of our own on loopback for as long as it is needed.

Must be used before Prefect is imported, because Prefect reads its settings then.

Every server of ours wants a password, takes requests from pages of its own origin only, for its own host only, and
keeps its files to its owner: who can talk to it can have a worker run any command.
"""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

from artifacts.store import Store
from flows.access import REPOSITORY, Access, AccessFile, new_password
from flows.prefect_process import HOSTS
from flows.terminal import errors
from tasks.runtime.processes import environment

HOST = HOSTS[0]
START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 2.0
MOST_RESTARTS = 3


class ServerError(RuntimeError):
    """The Prefect server cannot be used; the message says why, and what to do."""


class ServerLost(ServerError):
    """It is gone in the middle of a run.  Prefect's threads go on calling it for minutes: the process must not wait."""


def configure() -> None:
    """Settings that hold for every Prefect process we start: no telemetry, state beside the artifact store."""
    for name in [name for name, value in os.environ.items() if name.startswith("PREFECT_") and not value.strip()]:
        del os.environ[name]  # empty is what people write for "not set"; Prefect takes it for a value
    for name in ("NO_PROXY", "no_proxy"):  # a proxy knows nothing of our loopback
        others = [host for host in os.environ.get(name, "").split(",") if host and host not in HOSTS]
        os.environ[name] = ",".join([*others, *HOSTS])
    os.environ.setdefault("PREFECT_HOME", str(Store().root / "prefect"))
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    # A failed stage's traceback goes to its log and to the UI; the console gets the message.
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    os.environ.setdefault("PREFECT_LOGGING_INTERNAL_LEVEL", "CRITICAL")


@contextlib.contextmanager
def server() -> Iterator[Callable[[], str]]:
    """A live server: the one of $PREFECT_API_URL, else of `make serve`, else one started for this run.

    Yields a function that waits until it answers and tells where to look at it: our own server starts in the background
    meanwhile.  Raises ServerError.
    """
    configure()
    running = AccessFile().of_running_server()
    if url := os.environ.get("PREFECT_API_URL"):
        _check_given(url)
        with _telling_loss():
            yield lambda: page(url)
    elif running is not None and answers(running.url):
        with environment(_client(running)), _telling_loss():
            yield lambda: page(running.url)
    else:
        with own_server() as (ready, access), _telling_loss():
            yield lambda: f"{page(ready())} (password {access.password})"


@contextlib.contextmanager
def _telling_loss() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        import httpx  # with Prefect

        if isinstance(error, httpx.TransportError):
            raise ServerLost(
                f"the Prefect server was lost during the run ({error}). What had finished is kept: run the same "
                "command again"
            ) from None
        raise


def page(url: str) -> str:
    """The address of the UI beside an API."""
    return url.removesuffix("/api")


@contextlib.contextmanager
def own_server(port: int = 0, password: str | None = None) -> Iterator[tuple[Callable[[], str], Access]]:
    """Start a server on loopback in the background and stop it afterwards; port 0 is any that is free.

    Yields a function that waits until it answers and returns its address, and the access to it, which the environment
    names as long as it lives.  Raises ServerError.
    """
    configure()
    home = Path(os.environ["PREFECT_HOME"])
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _listener(port) as listener:
        url = f"http://{HOST}:{listener.getsockname()[1]}/api"
        access = Access(url, password or new_password())
        process = _Server(listener, access, home / "server.log")
        with process, environment(_client(access)):
            yield process.wait, access


def _client(access: Access) -> dict[str, str]:
    return {"PREFECT_API_URL": access.url, "PREFECT_API_AUTH_STRING": access.password}


def _settings(access: Access) -> dict[str, str]:
    """Settings of a server that only those with the password, and no page of another origin, can use."""
    port = urllib.parse.urlsplit(access.url).port
    return {
        **_client(access),
        "PREFECT_SERVER_API_AUTH_STRING": access.password,
        "PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS": ",".join(f"http://{host}:{port}" for host in HOSTS),
        "PREFECT_SERVER_API_CSRF_PROTECTION_ENABLED": "true",
        "PREFECT_SERVER_UI_API_URL": "/api",  # the UI's own origin, whichever of our names it was opened by
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    }


@contextlib.contextmanager
def _listener(port: int) -> Iterator[socket.socket]:
    """A socket that listens: it is ours from here on, so who answers there is our server."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, port))
        except OSError as error:
            raise ServerError(
                f"port {port} of {HOST} cannot be used ({error.strerror}): end the program that has it, or choose "
                "another, for example: reasoning-qat serve --port 4300"
            ) from None
        listener.listen(socket.SOMAXCONN)
        yield listener


class _Server:
    """The process of a server of ours.  One that dies is started again on the same socket: who called meanwhile waits,
    and a run goes on.
    """

    def __init__(self, listener: socket.socket, access: Access, log: Path) -> None:
        self._listener, self._access, self._log = listener, access, log
        self._stopping = threading.Event()
        self._changing = threading.Lock()
        self._keeper = threading.Thread(target=self._keep, daemon=True)

    def __enter__(self) -> _Server:
        self._log_start = self._log.stat().st_size if self._log.exists() else 0
        self._process = self._start()
        return self

    def __exit__(self, *_: object) -> None:
        flush_logs()
        with self._changing:
            self._stopping.set()
            stop(self._process)

    def wait(self) -> str:
        """The API's address, once it answers.  Raises ServerError, with the reason from the log, if it never will."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while not answers(self._access.url):
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise ServerError(f"the Prefect server did not start: {self._reason()} Its log is {self._log}")
            time.sleep(0.2)
        if not self._keeper.is_alive():
            self._keeper.start()
        return self._access.url

    def _start(self) -> subprocess.Popen[bytes]:
        descriptor = self._listener.fileno()
        command = [sys.executable, "-m", "flows.prefect_process", str(os.getpid()), "server", str(descriptor)]
        settings = {**os.environ, **_settings(self._access)}
        settings.pop("PREFECT_SERVER_API_BASE_PATH", None)
        with open(os.open(self._log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "ab") as log:
            return subprocess.Popen(
                command,
                env=settings,
                cwd=REPOSITORY,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                pass_fds=(descriptor,),
                umask=0o077,  # the database holds logs and parameters
            )

    def _keep(self) -> None:
        for _ in range(MOST_RESTARTS):
            code = self._process.wait()
            with self._changing:
                if self._stopping.is_set():
                    return
                errors.print(f"[yellow]the Prefect server ended (exit code {code}); it is started again[/]")
                self._process = self._start()
        self._process.wait()
        if not self._stopping.is_set():
            errors.print("[yellow]the Prefect server ended again; the run goes on without it[/]")
            self._listener.close()  # who calls is refused, instead of waiting

    def _reason(self) -> str:
        """The last error that this start wrote to the log, with the remedy where we know one."""
        with self._log.open("rb") as log:
            log.seek(self._log_start)
            lines = [line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]
        told = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
        reason = (told or lines or ["no word of it."])[-1][:120]
        if "database" not in reason.lower():
            return reason
        home = os.environ["PREFECT_HOME"]
        return f"{reason}. Delete {home}/prefect.db*: it holds the history that the UI shows, and no artifact."


def answers(url: str) -> bool:
    """Whether a Prefect server answers at this API address."""
    try:
        return _get(f"{url}/health") is True
    except (OSError, ValueError):
        return False


def _check_given(url: str) -> None:
    """Raise ServerError if the user's own server cannot be used."""
    if not answers(url):
        raise ServerError(f"no Prefect server answers at PREFECT_API_URL={url}; start it, or unset the variable")
    try:
        _get(f"{url}/admin/version", os.environ.get("PREFECT_API_AUTH_STRING"))
    except (OSError, ValueError) as error:  # Prefect Cloud has no such page
        if getattr(error, "code", None) == 401:
            raise ServerError(
                f"the Prefect server at PREFECT_API_URL={url} wants another password: set PREFECT_API_AUTH_STRING to "
                "it, or unset both for a server of this run's own"
            ) from None


def _get(url: str, password: str | None = None) -> object:
    request = urllib.request.Request(url)
    if password is not None:
        request.add_header("Authorization", f"Basic {base64.b64encode(password.encode()).decode()}")
    own = urllib.parse.urlsplit(url).hostname in HOSTS
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({} if own else None))
    with opener.open(request, timeout=2) as response:
        return json.loads(response.read(10_000))


def flush_logs() -> None:
    """Send what Prefect still holds of a run's log, before the server that takes it is stopped."""
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        for handler in logging.getLogger(name).handlers:
            handler.flush()


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a child process politely, then by force."""
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
