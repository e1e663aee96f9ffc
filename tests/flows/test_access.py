"""The private file that lets Prefect's commands in."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from flows.access import Access, AccessFile

ACCESS = Access("http://127.0.0.1:4300/api", 'reasoning-qat:"quotes" and \\ too')
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AccessFile:
    monkeypatch.delenv("PREFECT_SERVER_API_AUTH_STRING", raising=False)
    return AccessFile(tmp_path / ".prefect")


def test_the_file_is_the_owners_alone(file: AccessFile) -> None:
    before = os.umask(0)
    try:
        with file.serving():
            file.write(ACCESS)
    finally:
        os.umask(before)
    assert file.read() == ACCESS
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.path.parent.stat().st_mode) == 0o700


def test_the_running_server_is_known_as_long_as_it_lives(file: AccessFile) -> None:
    assert file.of_running_server() is None
    with file.serving() as free:
        assert free and file.of_running_server() is None, "it has not come up yet"
        file.write(ACCESS)
        assert file.of_running_server() == ACCESS
        with file.serving() as second:
            assert not second
    assert file.of_running_server() is None, "nobody is sent the password who has only taken its port"
    assert file.read() == ACCESS


def test_passwords_are_long_differ_and_are_kept(file: AccessFile, tmp_path: Path) -> None:
    first, other = file.password(), AccessFile(tmp_path / "other").password()
    assert first != other and len(first) > 40
    with file.serving():
        file.write(Access(ACCESS.url, first))
    assert file.password() == first


@pytest.mark.parametrize(
    "content", ["", "not toml [", "[profiles]\n", "active = 3", '[profiles.reasoning-qat]\nx = "y"']
)
def test_a_damaged_file_is_no_file(file: AccessFile, content: str) -> None:
    file.path.parent.mkdir()
    file.path.write_text(content)
    assert file.read() is None and file.password()


def test_prefect_reads_address_and_password_in_this_folder(file: AccessFile, tmp_path: Path) -> None:
    """As typed: with prefect.toml of the repository, without a variable of the environment."""
    with file.serving():
        file.write(ACCESS)
    settings = (REPOSITORY / "prefect.toml").read_text()
    (tmp_path / "prefect.toml").write_text(settings)
    assert tomllib.loads(settings)["profiles_path"] == ".prefect/profiles.toml"
    assert ".prefect/" in (REPOSITORY / ".gitignore").read_text().splitlines()
    code = (
        "from prefect.settings import get_current_settings as s\n"
        "print(s().api.url, s().api.auth_string.get_secret_value(), s().server.ephemeral.enabled)"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")}
    shown = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert shown.stdout.strip() == f"{ACCESS.url} {ACCESS.password} False"
