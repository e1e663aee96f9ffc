from __future__ import annotations

import errno
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from artifacts.ledger import Ledger


def _append(path: Path, writer: int) -> None:
    for index in range(50):
        Ledger(path).append("test", writer=writer, index=index, padding="x" * 5000)


def test_lines_of_several_processes_stay_whole_and_in_order(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=_append, args=(path, writer)) for writer in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    events = list(Ledger(path).events())
    assert len(events) == path.read_bytes().count(b"\n") == 150
    for writer in range(3):
        assert [event["index"] for event in events if event["writer"] == writer] == list(range(50))


def test_a_truncated_line_is_skipped_and_does_not_swallow_the_next(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    assert list(ledger.events()) == []
    ledger.append("first")
    ledger.append("second", text="lost")
    ledger.path.write_bytes(ledger.path.read_bytes()[:-10])
    ledger.append("third")
    assert [event["event"] for event in ledger.events()] == ["first", "third"]


def test_a_line_of_which_a_bit_flipped_is_skipped(tmp_path: Path, flip_bit: Callable[..., None]) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.append("first", text="kept")
    ledger.append("second", text="lost")
    size = ledger.path.stat().st_size
    for place in range(size // 2, size - 1, 5):
        flip_bit(ledger.path, place / (size - 1))
        assert [event["event"] for event in ledger.events()][1:] in ([], ["second"])
        assert all(event["text"] in ("kept", "lost") for event in ledger.events())
        flip_bit(ledger.path, place / (size - 1))
    flip_bit(ledger.path, 0.9)
    assert [event["event"] for event in ledger.events()] == ["first"]


def test_a_short_write_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.append("first")
    before = ledger.path.read_bytes()
    write = os.write

    def half(descriptor: int, data: Any) -> int:
        return write(descriptor, data[: len(data) // 2])

    monkeypatch.setattr(os, "write", half)
    with pytest.raises(OSError, match="space") as caught:
        ledger.append("second")
    assert caught.value.errno == errno.ENOSPC
    assert ledger.path.read_bytes() == before
