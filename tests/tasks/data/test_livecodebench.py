"""LiveCodeBench's columns, its pickled one included, become tests; nothing in a pickle is ever run."""

import base64
import json
import pickle
import zlib

import pytest

from tasks.data import livecodebench
from tasks.data.livecodebench import livecodebench_tests
from tasks.judging.code_tests import parse_tests

PUBLIC = '[{"input": "1\\n", "output": "2\\n", "testtype": "stdin"}]'
PRIVATE = [{"input": "3\n\u00fc", "output": "6\n", "testtype": "stdin"}]
FUNCTIONAL = '[{"input": "[1]\\n2", "output": "3", "testtype": "functional"}]'


def encode(content: object, protocol: int = 4) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(content, protocol))).decode()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_private_tests_are_read_from_any_pickle_of_a_text(protocol: int) -> None:
    tests = parse_tests(livecodebench_tests(PUBLIC, encode(json.dumps(PRIVATE), protocol), "{}"))
    assert [(test.input, test.output, test.type) for test in tests] == [
        ("1\n", "2\n", "stdin"),
        ("3\n\u00fc", "6\n", "stdin"),
    ]


def test_long_texts_are_read_too() -> None:
    private = [{"input": "x" * 100_000, "output": "y", "testtype": "stdin"}]
    assert parse_tests(livecodebench_tests("[]", encode(json.dumps(private)), "{}"))[0].input == "x" * 100_000


def test_plain_private_tests_and_functions() -> None:
    (first, second) = parse_tests(livecodebench_tests(FUNCTIONAL, FUNCTIONAL, '{"func_name": "add"}'))
    assert first == second
    assert (first.fn_name, json.loads(first.stdin)) == ("add", [[1], 2])


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("run",)


@pytest.mark.parametrize("content", [Bomb(), [json.dumps(PRIVATE)], b"[]", 1, ("a", "b"), None], ids=str)
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_any_other_pickle_is_refused(content: object, protocol: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="private_test_cases hold"):
        livecodebench_tests("[]", encode(content, protocol), "{}")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("public", "private", "metadata", "message"),
    [
        (PUBLIC, "!", "{}", "base64"),
        (PUBLIC, base64.b64encode(b"no zlib").decode(), "{}", "decompressed"),
        (PUBLIC, encode(json.dumps(PRIVATE))[:-8], "{}", "cut off"),
        (PUBLIC, base64.b64encode(zlib.compress(b"x")).decode(), "{}", "opcode"),
        (FUNCTIONAL, "[]", "{}", "func_name"),
        ('[{"input": "1", "output": "2"}]', "[]", "{}", "missing fields"),
        ('[{"input": "1", "output": "2", "testtype": "stdin", "key": 1}]', "[]", "{}", "unknown"),
    ],
)
def test_other_columns_are_refused(public: str, private: str, metadata: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        livecodebench_tests(public, private, metadata)


def test_a_decompression_bomb_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(livecodebench, "MAX_BYTES", 1000)
    with pytest.raises(ValueError, match="longer than 1000 bytes"):
        livecodebench_tests("[]", encode("[" + " " * 10_000 + "]"), "{}")
