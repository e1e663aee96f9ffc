"""Our own server: who may use it, what becomes of it when it dies, and what is told when it cannot start."""

from __future__ import annotations

import base64
import http.client
import http.server
import json
import os
import signal
import socket
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from flows.access import Access
from flows.server import ServerError, answers, configure, own_server, server

PROXIES = ("http_proxy", "HTTP_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "no_proxy", "NO_PROXY")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def surroundings(home: Path) -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("PREFECT_") or name in PROXIES]:
            patch.delenv(name)
        patch.setenv("REASONING_QAT_STORE", str(home))
        yield patch


@pytest.fixture(scope="module")
def access(surroundings: pytest.MonkeyPatch) -> Iterator[Access]:
    """A server that was started behind a proxy, as `reasoning-qat run` starts it, and that is used by every test."""
    surroundings.setenv("http_proxy", "http://127.0.0.1:9")  # the discard port: nobody answers
    surroundings.setenv("no_proxy", "internal")
    with own_server() as (ready, access):
        assert ready() == access.url
        yield access


def port_of(access: Access) -> int:
    return int(access.url.split(":")[2].split("/")[0])


def ask(access: Access, method: str, path: str, body: Any = None, **headers: str) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", port_of(access), timeout=60)
    content = None if body is None else json.dumps(body).encode()
    connection.request(method, path, body=content, headers={k.replace("_", "-"): v for k, v in headers.items()})
    return connection.getresponse()


def basic(password: str) -> str:
    return f"Basic {base64.b64encode(password.encode()).decode()}"


def test_every_route_wants_the_password(access: Access) -> None:
    schema = json.loads(ask(access, "GET", "/openapi.json").read())
    open_routes, num = set(), 0
    for path, methods in schema["paths"].items():
        for method in methods:
            num += 1
            for password in ({}, {"Authorization": basic("reasoning-qat:guess")}):
                response = ask(access, method.upper(), f"/api{path}".replace("{", "").replace("}", ""), {}, **password)
                if response.status not in (401, 403):
                    open_routes.add(path)
    assert num > 150 and open_routes == {"/health", "/ready"}


@pytest.mark.parametrize("host", ["evil.example", "evil.example:{port}", "10.0.0.1:{port}", ""])
def test_another_host_is_refused_even_with_the_password(access: Access, host: str) -> None:
    """A page whose name is made to lead to 127.0.0.1 sends its own name."""
    headers = {"Host": host.format(port=port_of(access)), "Authorization": basic(access.password)}
    for path in ("/", "/api/health", "/api/admin/version"):
        assert ask(access, "GET", path, **headers).status == 400


@pytest.mark.parametrize("origin", ["https://evil.example", "http://127.0.0.1:{port}0", "null"])
def test_a_page_of_another_origin_can_neither_read_nor_write(access: Access, origin: str) -> None:
    headers = {"Origin": origin.format(port=port_of(access))}
    asked = {"Access_Control_Request_Method": "POST", "Access_Control_Request_Headers": "authorization,content-type"}
    assert ask(access, "OPTIONS", "/api/flows/", **headers, **asked).status == 400
    allowed = {**headers, "Authorization": basic(access.password)}  # as if a browser had learnt it
    response = ask(access, "GET", "/api/admin/version", **allowed)
    assert response.getheader("access-control-allow-origin") is None
    assert ask(access, "POST", "/api/flows/", {"name": "evil"}, **allowed).status == 403, "no CSRF token"
    own = f"http://127.0.0.1:{port_of(access)}"
    response = ask(access, "GET", "/api/admin/version", Origin=own, Authorization=basic(access.password))
    assert response.status == 200 and response.getheader("access-control-allow-origin") == own


@pytest.mark.parametrize("path", ["events/in", "events/out", "logs/out", "task_runs/subscriptions/scheduled"])
@pytest.mark.parametrize("subprotocols", [None, ["prefect"]])
def test_sockets_want_the_password_too(access: Access, path: str, subprotocols: Any) -> None:
    url = f"ws://127.0.0.1:{port_of(access)}/api/{path}"
    with (
        pytest.raises((ConnectionClosed, InvalidStatus)),
        connect(url, subprotocols=subprotocols, proxy=None) as connection,
    ):
        connection.send(json.dumps({"type": "auth", "token": "guess"}))
        connection.recv(timeout=30)
    with pytest.raises(InvalidStatus), connect(url, additional_headers={"Host": "evil.example"}, proxy=None):
        pass


def test_files_are_the_owners_alone_and_the_password_is_on_no_command_line(access: Access, home: Path) -> None:
    folder = home / "prefect"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {"prefect.db", "server.log"} <= {path.name for path in files}
    assert [path for path in files if stat.S_IMODE(path.stat().st_mode) & 0o077] == []
    for process in psutil.Process().children(recursive=True):
        assert access.password not in " ".join(process.cmdline())


def test_the_environment_names_the_server_and_goes_round_the_proxy(access: Access) -> None:
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

    assert (os.environ["PREFECT_API_URL"], os.environ["PREFECT_API_AUTH_STRING"]) == (access.url, access.password)
    assert os.environ["no_proxy"] == "internal,127.0.0.1,localhost"
    with (
        temporary_settings({PREFECT_API_URL: access.url, PREFECT_API_AUTH_STRING: access.password}),
        get_client(sync_client=True) as client,
    ):
        assert client.api_healthcheck() is None
        assert client.create_flow_from_name("ours")


def test_a_server_that_dies_is_started_again_and_callers_wait(access: Access) -> None:
    [process] = [p for p in psutil.Process().children() if "flows.prefect_process" in " ".join(p.cmdline())]
    os.kill(process.pid, signal.SIGKILL)
    time.sleep(0.5)
    assert ask(access, "GET", "/api/admin/version", Authorization=basic(access.password)).status == 200


def test_a_taken_port_is_told(access: Access) -> None:
    with pytest.raises(ServerError, match=f"port {port_of(access)} .* --port") as caught, own_server(port_of(access)):
        pass
    assert len(str(caught.value)) < 300


def test_the_users_password_is_taken(access: Access, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_SERVER_API_AUTH_STRING", "mine:secret")
    with own_server() as (_, other):
        assert other.password == "mine:secret" == os.environ["PREFECT_API_AUTH_STRING"]
    assert os.environ["PREFECT_API_AUTH_STRING"] == access.password


@pytest.mark.parametrize("damage", ["bytes", "folder"])
def test_a_damaged_database_is_told_with_its_remedy(
    surroundings: pytest.MonkeyPatch, tmp_path: Path, damage: str
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_HOME", str(tmp_path))
        patch.delenv("PREFECT_API_URL", raising=False)
        database = tmp_path / "prefect.db"
        database.mkdir() if damage == "folder" else database.write_bytes(b"no database" * 1000)
        with pytest.raises(ServerError, match=r"Delete .*prefect\.db") as caught, own_server() as (ready, _):
            ready()
    assert "server.log" in str(caught.value) and len(str(caught.value)) < 300 + 2 * len(str(tmp_path))


def test_the_users_server_is_used_and_its_password_asked_for(access: Access, monkeypatch: pytest.MonkeyPatch) -> None:
    with server() as ready:  # PREFECT_API_URL and PREFECT_API_AUTH_STRING are the fixture's
        assert ready() == access.url.removesuffix("/api")
    monkeypatch.delenv("PREFECT_API_AUTH_STRING")
    with pytest.raises(ServerError, match="set PREFECT_API_AUTH_STRING"), server():
        pass


class Stranger(http.server.BaseHTTPRequestHandler):
    """Something else than Prefect, which finds every page healthy."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"status": "ok"}')

    def log_message(self, *args: Any) -> None: ...


def test_what_is_no_prefect_server_is_not_taken_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Stranger) as stranger:
        threading.Thread(target=stranger.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{stranger.server_port}/api"
        assert not answers(url)
        monkeypatch.setenv("PREFECT_API_URL", url)
        with pytest.raises(ServerError, match="no Prefect server answers at PREFECT_API_URL"), server():
            pass
        stranger.shutdown()


@pytest.mark.parametrize("url", ["http://127.0.0.1:{free}/api", "nonsense", "http://", "ftp://127.0.0.1/api"])
def test_an_address_without_a_server_is_told(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv("PREFECT_API_URL", url.format(free=probe.getsockname()[1]))
    with pytest.raises(ServerError, match="unset the variable"), server():
        pass


def test_empty_settings_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """PREFECT_API_URL="" is how people switch a variable off."""
    for name in ("PREFECT_API_URL", "PREFECT_API_AUTH_STRING", "PREFECT_HOME"):
        monkeypatch.setenv(name, " ")
    configure()
    assert "PREFECT_API_URL" not in os.environ and os.environ["PREFECT_HOME"].endswith("prefect")
