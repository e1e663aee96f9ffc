"""Mid-stage folders: whole or not there, and set aside when a byte of them changed."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from artifacts import scratch

Damage = Callable[[Path], None]


def write(folder: Path, text: str = "state" * 20) -> Path:
    with scratch.writing(folder) as inside:
        (inside / "tensors").write_text(text)
        (inside / "log.json").write_text("[]")
    return folder


def test_a_folder_appears_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "block-1"
    assert not scratch.is_sound(target)
    with scratch.writing(target) as inside:
        (inside / "tensors").write_text("x")
        assert not target.exists()
    assert scratch.is_sound(target) and os.listdir(tmp_path) == ["block-1"]


def test_an_error_inside_leaves_what_was_there(tmp_path: Path) -> None:
    target = write(tmp_path / "block-1", "old")
    with pytest.raises(OSError, match="full"), scratch.writing(target) as inside:
        (inside / "tensors").write_text("new")
        raise OSError(28, "full")
    assert scratch.is_sound(target) and (target / "tensors").read_text() == "old"
    assert os.listdir(tmp_path) == ["block-1"], "a full disk gets its space back"


@pytest.mark.parametrize("left", ["folder", "file"])
def test_what_a_kill_left_is_replaced(tmp_path: Path, left: str) -> None:
    half = tmp_path / "tmp-block-1"
    half.write_text("") if left == "file" else (half / "inner").mkdir(parents=True)
    assert scratch.is_sound(write(tmp_path / "block-1"))
    assert os.listdir(tmp_path) == ["block-1"]


@pytest.mark.parametrize("name", ["tensors", "log.json", "MANIFEST.json"])
def test_damage_is_set_aside_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Damage, name: str
) -> None:
    for number in (1, 2):
        damage(write(tmp_path / "block-1") / name)
        with caplog.at_level(logging.WARNING, "artifacts"):
            assert not scratch.is_sound(tmp_path / "block-1")
        assert (tmp_path / f"damaged-block-1-{number}").is_dir() and not (tmp_path / "block-1").exists()
        assert f"set aside as damaged-block-1-{number}" in caplog.messages[-1] and len(caplog.messages[-1]) < 300


@pytest.mark.parametrize("what", ["added file", "link", "a file in its place", "a link to nothing", "no manifest"])
def test_folders_that_are_not_as_they_were_written(tmp_path: Path, what: str) -> None:
    target = write(tmp_path / "block-1")
    if what == "added file":
        (target / "more").write_text("")
    elif what == "link":
        (target / "tensors").rename(tmp_path / "elsewhere")
        (target / "tensors").symlink_to(tmp_path / "elsewhere")
    elif what == "no manifest":  # as an earlier version of this program left it
        (target / "MANIFEST.json").unlink()
    else:
        scratch.remove(target)
        target.symlink_to("nowhere") if what == "a link to nothing" else target.write_text("")
    assert not scratch.is_sound(target)
    assert not os.path.lexists(target) and os.path.lexists(tmp_path / "damaged-block-1-1")
