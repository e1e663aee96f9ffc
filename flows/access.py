"""Who may use the server of `reasoning-qat serve`: its address and password, in a private file of this folder.

The file is a profile of Prefect's, and prefect.toml says where it is: Prefect's commands find the server, and are let
in, as they are typed in this folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import tempfile
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from artifacts.keys import REPOSITORY
from artifacts.locks import FileLock

PROFILE = "reasoning-qat"
_URL, _PASSWORD = "PREFECT_API_URL", "PREFECT_API_AUTH_STRING"


@dataclass(frozen=True)
class Access:
    """Address of a server's API, and the password (Prefect's "auth string") that every request must bring."""

    url: str
    password: str


def new_password() -> str:
    """The user's own ($PREFECT_SERVER_API_AUTH_STRING), or one that nobody can guess."""
    return os.environ.get("PREFECT_SERVER_API_AUTH_STRING") or f"{PROFILE}:{secrets.token_urlsafe(24)}"


class AccessFile:
    """`profiles.toml` in a folder that only its owner can read, with a lock that `serve` holds as long as it lives."""

    def __init__(self, folder: Path = REPOSITORY / ".prefect") -> None:
        self.path = folder / "profiles.toml"
        self._lock = FileLock(folder / "serve.lock")

    @contextlib.contextmanager
    def serving(self) -> Iterator[bool]:
        """Hold the lock, or yield False where another `serve` of this folder holds it."""
        self.path.parent.mkdir(mode=0o700, exist_ok=True)
        self.path.parent.chmod(0o700)
        if not (taken := self._lock.try_acquire()):
            time.sleep(0.5)  # a run may just have been looking
            taken = self._lock.try_acquire()
        try:
            yield taken
        finally:
            self._lock.release()

    def of_running_server(self) -> Access | None:
        """The access to the server of a `serve` that lives; nobody else is ever sent the password."""
        if not self.path.exists():
            return None
        if self._lock.try_acquire():
            self._lock.release()
            return None
        return self.read()

    def read(self) -> Access | None:
        """What was written last; the server may have ended."""
        with contextlib.suppress(OSError, tomllib.TOMLDecodeError, KeyError):
            profile = tomllib.loads(self.path.read_text())["profiles"][PROFILE]
            return Access(profile[_URL], profile[_PASSWORD])
        return None

    def password(self) -> str:
        """That of the last server of this folder, so that a browser is asked once; or a new one."""
        last = self.read()
        if last is None or "PREFECT_SERVER_API_AUTH_STRING" in os.environ:
            return new_password()
        return last.password

    def write(self, access: Access) -> None:
        """Replace the file, readable by its owner alone."""
        lines = [
            "# Written by `reasoning-qat serve`; keep it private: who has the password can run code as you.",
            f"active = {json.dumps(PROFILE)}",
            f"[profiles.{PROFILE}]",
            f"{_URL} = {json.dumps(access.url)}",
            f"{_PASSWORD} = {json.dumps(access.password)}",
        ]
        descriptor, temporary = tempfile.mkstemp(dir=self.path.parent)  # of mode 0600
        with os.fdopen(descriptor, "w") as file:
            file.write("\n".join(lines) + "\n")
        os.replace(temporary, self.path)
