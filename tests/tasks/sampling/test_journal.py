"""The journal keeps what was finished, whatever a kill or a full disk does to its last line."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.sampling.engine import Request, SamplingParams
from tasks.sampling.journal import Generation, Journal, request_key

SAMPLING = SamplingParams(temperature=0.6, top_p=0.95, max_new_tokens=8, stop_token_ids=(2,))
FIRST, SECOND = Generation((5, 6, 2), "stop", -0.25, 1.5), Generation((7,) * 8, "length", None, 2.0)
ENGINE = {"engine": "transformers", "torch": "2.13.0", "dtype": "bfloat16", "device": "cpu"}


def test_finished_generations_are_found_again(tmp_path):
    path = tmp_path / "journal"
    with Journal(path) as journal:
        journal.append("one", FIRST)
        journal.append("two", SECOND)
    with Journal(path) as journal:
        assert (journal.get("one"), journal.get("two")) == (FIRST, SECOND)
        assert journal.get("three") is None


@pytest.mark.parametrize("num_kept_bytes", range(1, 60, 7))
def test_a_line_cut_by_a_kill_is_dropped_and_does_not_spoil_the_next(tmp_path, num_kept_bytes):
    path = tmp_path / "journal"
    with Journal(path) as journal:
        journal.append("one", FIRST)
        whole = path.stat().st_size
        journal.append("two", SECOND)
    path.write_bytes(path.read_bytes()[: whole + num_kept_bytes])
    with Journal(path) as journal:
        assert (journal.get("one"), journal.get("two")) == (FIRST, None)
        journal.append("two", SECOND)
    with Journal(path) as journal:
        assert (journal.get("one"), journal.get("two")) == (FIRST, SECOND)


def test_a_record_is_in_the_file_when_append_returns(tmp_path):
    path = tmp_path / "journal"
    with Journal(path) as journal:
        journal.append("one", FIRST)
        assert path.read_bytes().endswith(b"}\n")


def lines(path):
    return path.read_bytes().split(b"\n")[:-1]


def written(tmp_path) -> bytes:
    """The line of FIRST, as it stands in a file."""
    with Journal(tmp_path / "another") as journal:
        journal.append("one", FIRST)
    return lines(tmp_path / "another")[0]


def with_fields(line: bytes, **fields) -> bytes:
    """Fields changed by somebody who leaves the checksum as it is."""
    return json.dumps(json.loads(line) | fields).encode()


DAMAGES = {
    "cut": lambda line: line[:20],
    "without its checksum": lambda line: line.rpartition(b', "check"')[0] + b"}",
    "zeros": lambda line: b"\0" * 40,
    "empty": lambda line: b"",
    "no object": lambda line: b"[1]",
    "no text": lambda line: b"\xff\xfe",
    "nested without end": lambda line: b"[" * 100_000,
    "another program's": lambda line: b'{"key": "one", "token_ids": [1], "finish_reason": "stop"}',
    "an earlier release's": lambda line: json.dumps({"key": "one", **dataclasses.asdict(FIRST)}).encode(),
    "another token": lambda line: with_fields(line, token_ids=[5, 7, 2]),
    "another key": lambda line: with_fields(line, key="other"),
    "joined with the next": lambda line: line + line,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_line_is_reported_and_generated_again(tmp_path, caplog, damage):
    path, damaged = tmp_path / "journal", damage(written(tmp_path))
    with Journal(path) as journal:
        journal.append("two", SECOND)
    path.write_bytes(damaged + b"\n" + path.read_bytes())
    with Journal(path) as journal:
        assert (journal.get("one"), journal.get("two")) == (None, SECOND)
        journal.append("one", FIRST)
    assert "1 damaged lines" in caplog.text
    assert lines(path)[0] == damaged and len(lines(path)) == 3, "what is there is left as it is"
    with Journal(path) as journal:
        assert journal.get("one") == FIRST


@given(place=st.integers(0, 10**6), bit=st.integers(0, 7))
@settings(max_examples=300, deadline=None)
def test_a_flipped_bit_is_never_believed(tmp_path_factory, place, bit):
    path = tmp_path_factory.mktemp("flipped") / "journal"
    with Journal(path) as journal:
        journal.append("one", FIRST)
        journal.append("two", SECOND)
    content = bytearray(path.read_bytes())
    content[place % len(content)] ^= 1 << bit
    path.write_bytes(content)
    with Journal(path) as journal:
        found = [journal.get("one"), journal.get("two")]
        assert [f for f in found if f is not None] in ([FIRST], [SECOND], []), "at most the line beside it goes along"
        journal.append("three", FIRST)
    with Journal(path) as journal:
        assert [journal.get("one"), journal.get("two"), journal.get("three")] == [*found, FIRST]


SMALL_DISK = """
import resource, signal, sys
from pathlib import Path
from tasks.sampling.journal import Generation, Journal

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # else the kernel kills; ignored, it cuts the write and then refuses
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
with Journal(Path(sys.argv[1])) as journal:
    for number in range(100):
        try:
            journal.append(str(number), Generation((1,) * 40, "length", -1.0, 1.0))
        except OSError as error:
            print(number, error.errno)
            break
"""


def test_a_full_disk_is_an_error_and_leaves_whole_lines(tmp_path):
    """A real limit on the file's size, which cuts a write in the middle as a full disk does."""
    path = tmp_path / "journal"
    done = subprocess.run([sys.executable, "-c", SMALL_DISK, str(path)], capture_output=True, text=True, check=True)
    num_written, error = map(int, done.stdout.split())
    assert num_written > 2 and os.strerror(error) == "No space left on device"
    assert path.read_bytes().endswith(b"}\n") and len(lines(path)) == num_written
    with Journal(path) as journal:  # space was freed
        assert journal.get(str(num_written - 1)) and journal.get(str(num_written)) is None
        journal.append(str(num_written), FIRST)
    assert len(lines(path)) == num_written + 1


def test_key_depends_on_everything_that_a_sample_depends_on():
    request = Request((1, 2, 3), seed=7)
    others = [
        (Request((1, 2, 4), seed=7), SAMPLING),
        (Request((1, 2, 3), seed=8), SAMPLING),
        *[
            (request, dataclasses.replace(SAMPLING, **{field: value}))
            for field, value in [
                ("temperature", 1.0),
                ("top_p", 1.0),
                ("max_new_tokens", 9),
                ("stop_token_ids", (2, 3)),
            ]
        ],
    ]
    engines = [ENGINE | {name: "another"} for name in ENGINE]
    keys = {request_key(request, SAMPLING, ENGINE)} | {request_key(*other, ENGINE) for other in others}
    keys |= {request_key(request, SAMPLING, engine) for engine in engines}
    assert len(keys) == 1 + len(others) + len(engines)
