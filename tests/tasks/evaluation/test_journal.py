"""The journal keeps what was finished, whatever a kill does to its last line."""

import dataclasses

import pytest

from tasks.evaluation.journal import Generation, Journal, request_key
from tasks.rollout.engine import Request, SamplingParams

SAMPLING = SamplingParams(temperature=0.6, top_p=0.95, max_new_tokens=8, stop_token_ids=(2,))
FIRST, SECOND = Generation((5, 6, 2), "stop"), Generation((7,) * 8, "length")


def test_finished_generations_are_found_again(tmp_path):
    path = tmp_path / "journal"
    with Journal(path) as journal:
        journal.append("one", FIRST)
        journal.append("two", SECOND)
    with Journal(path) as journal:
        assert (len(journal), journal.get("one"), journal.get("two")) == (2, FIRST, SECOND)
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
        assert (len(journal), journal.get("two")) == (2, SECOND)


def test_a_record_is_in_the_file_when_append_returns(tmp_path):
    path = tmp_path / "journal"
    with Journal(path) as journal:
        journal.append("one", FIRST)
        assert path.read_bytes().endswith(b"}\n")


def test_a_damaged_line_is_reported_and_generated_again(tmp_path, caplog):
    path = tmp_path / "journal"
    path.write_bytes(b'{"key": "one", "tok\n')
    with Journal(path) as journal:
        assert len(journal) == 0
    assert "damaged line" in caplog.text


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
    keys = {request_key(request, SAMPLING)} | {request_key(*other) for other in others}
    assert len(keys) == 1 + len(others)
