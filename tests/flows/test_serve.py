"""`reasoning-qat serve` in a folder of its own: commands as typed, pages of other origins, and its end."""

from __future__ import annotations

import http.client
import http.server
import importlib
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))
browsers = importlib.import_module("tests.flows.browser")
START_TIMEOUT_S = 180
STOP_TIMEOUT_S = 10
SMALL = ["calibrate.num_sequences=8", "calibrate.generation.max_new_tokens=8", "train_data.num_examples=64"]
LONG = [*SMALL, "kd_train.steps=2000", "kd_train.batch_size=8", "kd_train.micro_batch_size=8"]

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Served:
    folder: Path
    environment: dict[str, str]
    process: subprocess.Popen[bytes]
    port: int
    log: Path

    @property
    def password(self) -> str:
        [found] = re.findall(r"password: (\S+)", self.log.read_text())
        return found

    def typed(self, *more: str) -> subprocess.CompletedProcess[str]:
        """The command that `serve` prints, in its folder, by a shell that knows nothing of us."""
        [command] = re.findall(r"in another terminal, in \S+: (.*)", self.log.read_text())
        environment = {k: v for k, v in self.environment.items() if k not in ("PYTHONPATH", "REASONING_QAT_STORE")}
        return subprocess.run(
            [*command.split(), *more], cwd=self.folder, env=environment, capture_output=True, text=True, timeout=400
        )

    def asked(self, query: str) -> list[str]:
        """One column of Prefect's database."""
        with sqlite3.connect(self.folder.parent / "store" / "prefect" / "prefect.db") as database:
            return [value for (value,) in database.execute(query)]


def alive(processes: list[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Those that still run; a container without an init leaves some as zombies."""
    _, left = psutil.wait_procs(processes, timeout=seconds)
    return [process for process in left if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    """A copy of the repository, with `serve` on a port that is not Prefect's own."""
    folder = tmp_path / "copy"
    for name in ("flows", "tasks", "quant", "artifacts"):
        shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("store", "__pycache__"))
    for name in ("prefect.toml", "prefect.yaml", "pyproject.toml"):
        shutil.copy(REPOSITORY / name, folder)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")}
    environment |= {"PYTHONPATH": str(folder), "REASONING_QAT_STORE": str(tmp_path / "store")}
    log = tmp_path / "log"
    with log.open("wb") as file:
        command = [sys.executable, "-m", "flows.cli", "serve", "--port", str(port)]
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=file, stderr=file)
    served = Served(folder, environment, process, port, log)
    deadline = time.monotonic() + START_TIMEOUT_S
    while "Worker 'local' started" not in log.read_text():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
    yield served
    process.kill()
    process.wait()


def test_the_printed_command_runs_a_deployment_and_serve_ends_with_its_flow_runs(served: Served) -> None:
    second = subprocess.run(
        [sys.executable, "-m", "flows.cli", "serve", "--port", str(served.port + 1)],
        cwd=served.folder, env=served.environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert second.returncode == 1 and "is up in this folder already" in second.stderr
    parameters = ["-p", "recipe=tiny_w2g128", "-p", "until=calibrate", "-p", f"overrides={json.dumps(SMALL)}"]
    done = served.typed(*parameters)
    assert done.returncode == 0 and "Completed" in done.stdout, done.stdout + done.stderr
    own = subprocess.run(
        [sys.executable, "-m", "flows.cli", "run", "tiny_w2g128", "--until", "base_model"],
        cwd=served.folder, env=served.environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert own.returncode == 0 and f"http://127.0.0.1:{served.port}" in own.stderr, "a run takes the server of serve"

    parameters = ["recipe=tiny_w2g128", "until=kd_train", 'branches=["*Reasoning*"]', f"overrides={json.dumps(LONG)}"]
    long = threading.Thread(target=served.typed, args=[part for p in parameters for part in ("-p", p)], daemon=True)
    long.start()
    deadline = time.monotonic() + 300
    while not list((served.folder.parent / "store" / "work").glob("*/checkpoint-*")):
        assert time.monotonic() < deadline, served.log.read_text()
        time.sleep(0.2)
    family = psutil.Process(served.process.pid).children(recursive=True)
    assert any("prefect.engine" in " ".join(process.cmdline()) for process in family)
    started = time.monotonic()
    served.process.send_signal(signal.SIGTERM)
    assert served.process.wait(60) == 143
    assert time.monotonic() - started < STOP_TIMEOUT_S
    assert not alive(family, 2)
    assert "stopped;" in served.log.read_text()
    states = served.asked("select state_name from flow_run order by created")
    assert states == ["Completed", "Completed", "Crashed"]


def test_what_serve_started_ends_with_a_killed_serve(served: Served) -> None:
    family = psutil.Process(served.process.pid).children(recursive=True)
    assert len(family) >= 2
    served.process.kill()
    assert not alive(family, 10)


def attack(port: int, mark: Path, headers: dict[str, str]) -> list[int]:
    """What a page sends to have the worker run a shell script, as ../shared/cases/security/csrf_rce.py does."""

    def post(path: str, body: object) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request("POST", f"/api{path}", body=json.dumps(body).encode(), headers=headers)
        return connection.getresponse().status

    step = {"prefect.deployments.steps.run_shell_script": {"script": f"sh -c 'id > {mark}'"}}
    pool = {"work_pool_name": "local", "work_queue_name": "default", "entrypoint": "x.py:f", "pull_steps": [step]}
    nobody = "00000000-0000-0000-0000-000000000000"
    return [
        post("/flows/", {"name": "evil"}),
        post("/deployments/", {"name": "evil", "flow_id": nobody, **pool}),
        post(f"/deployments/{nobody}/create_flow_run", {"state": {"type": "SCHEDULED"}}),
        post("/deployments/get_scheduled_flow_runs", {"deployment_ids": [nobody]}),
    ]


class Evil(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"<title>evil</title>")

    def log_message(self, *args: object) -> None: ...


@pytest.mark.skipif(browsers.CHROMIUM is None, reason="needs chromium")
def test_a_page_of_another_origin_reaches_nothing_and_the_ui_works_with_the_password(
    served: Served, tmp_path: Path
) -> None:
    origin = {"Origin": "https://evil.example"}
    assert attack(served.port, tmp_path / "mark", {**origin, "Host": "evil.example"}) == [400] * 4
    assert attack(served.port, tmp_path / "mark", origin) == [403] * 4
    with (
        http.server.ThreadingHTTPServer(("127.0.0.1", 0), Evil) as evil,
        browsers.browser(tmp_path / "profile") as page,
    ):
        threading.Thread(target=evil.serve_forever, daemon=True).start()
        for host in ("127.0.0.1", "localhost"):
            page.open(f"http://{host}:{served.port}/")
            page.until("location.pathname.includes('login') && !!document.querySelector('input')")
            page.run("document.querySelector('input').focus()")
            page.type_text(served.password)
            page.run("document.querySelector('form button, button').click()")
            page.until("!location.pathname.includes('login') && document.body.innerText.includes('Dashboard')")
            page.open(f"http://{host}:{served.port}/deployments")
            page.until("document.body.innerText.includes('evaluate')")
        page.open(f"http://127.0.0.1:{evil.server_port}/")
        page.until("document.title == 'evil'")
        server = f"127.0.0.1:{served.port}"
        body = "body: JSON.stringify({name: 'evil'})"
        for options in ("{}", "{credentials: 'include'}", f"{{method: 'POST', {body}}}"):
            for path in ("health", "admin/version", "flows/"):
                script = f"fetch('http://{server}/api/{path}', {options}).then(r => r.text(), e => 'refused')"
                assert page.run(script) == "refused"
        blind = f"fetch('http://{server}/api/flows/', {{method: 'POST', mode: 'no-cors', {body}}}).then(r => r.type)"
        assert page.run(blind) == "opaque"
        for path in ("events/in", "events/out"):
            script = (
                f"new Promise(done => {{const s = new WebSocket('ws://{server}/api/{path}', 'prefect'); "
                "s.onopen = () => s.send(JSON.stringify({type: 'auth', token: 'guess'})); "
                "s.onmessage = m => done('told ' + m.data); s.onclose = e => done('closed')})"
            )
            assert page.run(script) == "closed"
        evil.shutdown()
    assert served.asked("select name from flow") == ["reasoning-qat"]
    assert not (tmp_path / "mark").exists()
