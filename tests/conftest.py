"""What happens to files: a fixture that damages one, for every kind of damage."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

Damage = Callable[[Path], None]


def flip(file: Path, place: float = 1.0, bit: int = 1) -> None:
    """Change one bit and put the modification time back: what a failing disk does."""
    before = file.stat()
    content = bytearray(file.read_bytes())
    content[int(place * (len(content) - 1))] ^= bit
    _write(file, bytes(content))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def _write(file: Path, content: bytes) -> None:
    file.chmod(0o644)
    file.write_bytes(content)


def _replace_by_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def _forbid(file: Path) -> None:
    file.chmod(0)
    if os.access(file, os.R_OK):
        pytest.skip("root reads it all the same")


DAMAGES: dict[str, Damage] = {
    "last bit": flip,
    "a bit near the beginning": lambda file: flip(file, 0.1, 4),
    "truncated": lambda file: os.truncate(file, file.stat().st_size // 2),
    "empty": lambda file: os.truncate(file, 0),
    "deleted": Path.unlink,
    "longer": lambda file: _write(file, file.read_bytes() + b"x"),
    "garbage": lambda file: _write(file, b'{"a": [NaN, \xff'),
    "a folder": _replace_by_folder,
    "unreadable": _forbid,
}


@pytest.fixture(params=DAMAGES)
def damage(request: pytest.FixtureRequest) -> Damage:
    """`damage(file)`, once for each kind."""
    return DAMAGES[request.param]


@pytest.fixture
def flip_bit() -> Callable[..., None]:
    return flip
