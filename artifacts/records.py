"""What a stage run was: its whole key payload and the artifact it gave; how two payloads differ, in words."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from artifacts.keys import canonical
from artifacts.refs import Ref

FORMAT = 2
FORMAT_WITHOUT_CHECKSUM = 1  # read, not written
PAYLOAD_FIELDS = ("stage", "version", "code", "config", "inputs")
LONGEST_VALUE = 60  # characters of a value shown in a difference

_ABSENT = object()


@dataclass(frozen=True)
class Record:
    """One finished stage run. `provenance` (versions, seconds, metrics), `created` and `telemetry` enter no digest."""

    key: str
    payload: dict[str, Any]
    ref: Ref
    provenance: dict[str, Any]
    created: str
    telemetry: Ref | None = None
    """What was measured while it ran, an artifact of its own."""

    @property
    def stage(self) -> str:
        return str(self.payload["stage"])

    def to_dict(self) -> dict[str, Any]:
        """JSON data; a number that is not finite becomes null, what JSON does not know becomes text."""
        return {
            "format": FORMAT,
            "key": self.key,
            "payload": self.payload,
            "ref": str(self.ref),
            "provenance": _json_data(self.provenance),
            "created": self.created,
            "telemetry": None if self.telemetry is None else str(self.telemetry),
        }

    def to_json(self) -> bytes:
        """The record's file: its data and their checksum."""
        data = self.to_dict()
        return json.dumps({**data, "sha256": _checksum(data)}, indent=1).encode() + b"\n"

    @classmethod
    def from_json(cls, text: bytes) -> Record:
        """Raises ValueError if `text` is damaged or is not a record."""
        try:
            data = json.loads(text)
            expected = data.pop("sha256", None)
            if (expected or data.get("format") != FORMAT_WITHOUT_CHECKSUM) and expected != _checksum(data):
                raise ValueError("it does not have its checksum")
            payload, provenance = data["payload"], data["provenance"]
            if not (isinstance(provenance, dict) and set(PAYLOAD_FIELDS) == set(payload)):
                raise ValueError("fields missing")
            telemetry = Ref.parse(data["telemetry"]) if data.get("telemetry") else None
            return cls(str(data["key"]), payload, Ref.parse(data["ref"]), provenance, str(data["created"]), telemetry)
        except (TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"not a record: {error!r}") from error


def _checksum(data: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _json_data(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _json_data(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_data(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    with contextlib.suppress(AttributeError, ValueError, RuntimeError):
        return _json_data(value.item())  # a scalar of numpy or torch
    return str(value)


def nearest(payload: dict[str, Any], records: Iterable[Record]) -> tuple[Record, list[str]] | None:
    """The record of the same stage with the fewest differences, the newest of equals; None if none."""
    same_stage = [record for record in records if record.stage == payload["stage"]]
    if not same_stage:
        return None
    by_age = sorted(same_stage, key=lambda record: record.created, reverse=True)
    compared = ((record, differences(record.payload, payload)) for record in by_age)
    return min(compared, key=lambda pair: len(pair[1]))


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Why `new` has another key than `old`: "config.seed 1 -> 2", "input student changed", "code changed"."""
    found = []
    if old["version"] != new["version"]:
        found.append(f"version {old['version']} -> {new['version']}")
    if old["code"] != new["code"]:
        found.append("code changed")
    found.extend(_config_differences(old["config"], new["config"]))
    for name in sorted({*old["inputs"], *new["inputs"]}):
        if name not in old["inputs"]:
            found.append(f"input {name} added")
        elif name not in new["inputs"]:
            found.append(f"input {name} removed")
        elif old["inputs"][name] != new["inputs"][name]:
            found.append(f"input {name} changed")
    return found


def _config_differences(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    before, after = dict(_flatten(old, "config")), dict(_flatten(new, "config"))
    for name in sorted({*before, *after}):
        was, now = before.get(name, _ABSENT), after.get(name, _ABSENT)
        if was is _ABSENT:
            yield f"{name} added ({_shown(now)})"
        elif now is _ABSENT:
            yield f"{name} removed (was {_shown(was)})"
        elif canonical(was) != canonical(now):  # 1, 1.0 and True are different keys
            yield f"{name} {_shown(was)} -> {_shown(now)}"


def _flatten(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for inner, item in value.items():
            yield from _flatten(item, f"{name}.{inner}")
    else:
        yield name, list(value) if isinstance(value, tuple) else value


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) and value else json.dumps(value, default=str)
    return text if len(text) <= LONGEST_VALUE else text[: LONGEST_VALUE - 3] + "..."
