"""Keys must never change by accident (golden files) and never collide by construction."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from artifacts.keys import canonical, digest
from artifacts.manifest import FileEntry, reference

GOLDEN = json.loads((Path(__file__).parent / "golden" / "keys.json").read_text())

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)


@pytest.mark.parametrize("case", GOLDEN["keys"], ids=lambda case: case["name"])
def test_golden_keys(case: dict[str, Any]) -> None:
    assert canonical(case["payload"]) == case["canonical"].encode()
    assert digest(case["payload"]) == hashlib.sha256(case["canonical"].encode()).hexdigest() == case["digest"]


def test_golden_artifact_digest() -> None:
    case = GOLDEN["artifact"]
    entries = [FileEntry(**entry) for entry in case["files"]]
    assert reference(case["kind"], entries).digest == reference(case["kind"], entries[::-1]).digest == case["digest"]
    assert reference("dataset", entries).digest != case["digest"]


def test_values_that_python_calls_equal_differ() -> None:
    values = [1, 1.0, True, "1", b"1", None, "None", [1], [[1]], {"1": 1}, 0, 0.0, -0.0, False, "", [], {}]
    assert len({canonical(value) for value in values}) == len(values)


@given(plain, plain)
@settings(max_examples=200, deadline=None)
def test_equal_bytes_only_for_equal_values(one: Any, other: Any) -> None:
    same = json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
    assert (canonical(one) == canonical(other)) == same


@given(plain)
@settings(max_examples=100, deadline=None)
def test_json_round_trip_keeps_the_key(value: Any) -> None:
    assert canonical(json.loads(json.dumps(value))) == canonical(value)


def test_order_of_names_and_tuples_do_not_matter() -> None:
    assert digest({"a": 1, "b": (1, 2)}) == digest({"b": [1, 2], "a": 1})


@pytest.mark.parametrize("value", [object(), {1: 2}, {1, 2}, np.float64(1.0), Path("x"), np.int64(3)])
def test_unknown_types_are_refused_with_their_place(value: Any) -> None:
    with pytest.raises(TypeError, match=r"value\.config\.x"):
        canonical({"config": {"x": value}})


def test_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match=r"value\.lr.*None"):
        canonical({"lr": float("nan")})
