"""What a stage run was: its whole key payload and the artifact it gave; how two payloads differ, in words."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from artifacts.keys import canonical
from artifacts.refs import Ref

FORMAT = 2
FORMAT_WITHOUT_CHECKSUM = 1  # read, not written
PAYLOAD_FIELDS = ("stage", "version", "code", "config", "inputs")
OPTIONAL_FIELDS = ("packages",)
LONGEST_VALUE = 60  # characters of a value shown in a difference

Definitions = Mapping[str, Mapping[str, str]]
"""What a stage's code consists of: by file and definition the beginning of its digest (`artifacts.code`)."""

_ABSENT = object()
_CHECKSUM = b'"sha256": "'
_NO_CHECKSUM = b"0" * 64


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

    @functools.cached_property
    def facts(self) -> dict[str, str]:
        """What the payload says, flat, for `nearest`."""
        return _facts(self.payload)

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
        """The record's file: its data, and the checksum of the file with zeros in the checksum's place."""
        text = json.dumps({**self.to_dict(), "sha256": _NO_CHECKSUM.decode()}, indent=1).encode() + b"\n"
        return _with_checksum(text, hashlib.sha256(text).hexdigest().encode())

    @classmethod
    def from_json(cls, text: bytes) -> Record:
        """Raises ValueError if `text` is damaged or is not a record."""
        try:
            data = json.loads(text)
            expected = data.get("sha256")
            has_none = expected is None and data.get("format") == FORMAT_WITHOUT_CHECKSUM
            if not has_none and hashlib.sha256(_with_checksum(text, _NO_CHECKSUM)).hexdigest() != expected:
                raise ValueError("it does not have its checksum")
            payload, provenance = data["payload"], data["provenance"]
            if not (isinstance(provenance, dict) and is_payload(payload)):
                raise ValueError("fields missing")
            telemetry = Ref.parse(data["telemetry"]) if data.get("telemetry") else None
            return cls(str(data["key"]), payload, Ref.parse(data["ref"]), provenance, str(data["created"]), telemetry)
        except (TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"not a record: {error!r}") from error


def is_payload(fields: Collection[str]) -> bool:
    """Whether these are the fields of a key's payload."""
    return set(PAYLOAD_FIELDS) <= set(fields) <= {*PAYLOAD_FIELDS, *OPTIONAL_FIELDS}


def _with_checksum(text: bytes, checksum: bytes) -> bytes:
    start = text.rfind(_CHECKSUM) + len(_CHECKSUM)
    return text[:start] + checksum + text[start + len(checksum) :]


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


def nearest(payload: dict[str, Any], records: Iterable[Record]) -> Record | None:
    """The record of the same stage with the fewest differences, the newest of equals; None if none."""
    wanted = _facts(payload)
    found: tuple[int, Record] | None = None
    for record in records:
        if record.stage == payload["stage"]:
            facts = record.facts
            distance = len(wanted.keys() | facts.keys()) - len(wanted.items() & facts.items())
            if found is None or (distance, found[1].created) < (found[0], record.created):
                found = distance, record
    return None if found is None else found[1]


def differences(
    old: dict[str, Any], new: dict[str, Any], old_code: Definitions | None = None, new_code: Definitions | None = None
) -> list[str]:
    """Why `new` has another key than `old`: "config.seed 1 -> 2", "input student changed", "torch 2.7 -> 2.8".

    With the definitions of both codes, which of them changed.
    """
    found = []
    if old["version"] != new["version"]:
        found.append(f"version {old['version']} -> {new['version']}")
    if old["code"] != new["code"]:
        found.append(code_difference(old_code or {}, new_code or {}))
    found.extend(_named_differences(old.get("packages", {}), new.get("packages", {}), "package "))
    found.extend(_named_differences(dict(_flatten(old["config"], "config")), dict(_flatten(new["config"], "config"))))
    for name in sorted({*old["inputs"], *new["inputs"]}):
        if name not in old["inputs"]:
            found.append(f"input {name} added")
        elif name not in new["inputs"]:
            found.append(f"input {name} removed")
        elif old["inputs"][name] != new["inputs"][name]:
            found.append(f"input {name} changed")
    return found


def code_difference(old: Definitions, new: Definitions) -> str:
    """Such as "code: quant/methods/gptq.py function solve changed, and 2 more"; "code changed" if no more is known."""
    before = {(path, label): value for path, labels in old.items() for label, value in labels.items()}
    after = {(path, label): value for path, labels in new.items() for label, value in labels.items()}
    if not before or not after or before == after:
        return "code changed"
    changed = [(place, "changed") for place in before.keys() & after.keys() if before[place] != after[place]]
    moved = [(place, "removed") for place in before.keys() - after.keys()]
    moved += [(place, "added") for place in after.keys() - before.keys()]
    ((path, label), what), *more = sorted(changed, key=_telling) + sorted(moved, key=_telling)
    return f"code: {path} {label} {what}" + (f", and {len(more)} more" if more else "")


def _telling(found: tuple[tuple[str, str], str]) -> tuple[bool, tuple[str, str]]:
    """Functions, classes and constants before imports."""
    return found[0][1].startswith("import"), found[0]


def _named_differences(before: dict[str, Any], after: dict[str, Any], what: str = "") -> Iterator[str]:
    for name in sorted({*before, *after}):
        was, now = before.get(name, _ABSENT), after.get(name, _ABSENT)
        name = what + name
        if was is _ABSENT:
            yield f"{name} added ({_shown(now)})"
        elif now is _ABSENT:
            yield f"{name} removed (was {_shown(was)})"
        elif canonical(was) != canonical(now):  # 1, 1.0 and True are different keys
            yield f"{name} {_shown(was)} -> {_shown(now)}"


def _facts(payload: dict[str, Any]) -> dict[str, str]:
    """What a payload says, flat, each as comparable text: 1, 1.0 and True differ."""
    return {name: f"{type(value).__name__} {value!r}" for name, value in _flatten(payload, "")}


def _flatten(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for inner, item in value.items():
            yield from _flatten(item, f"{name}.{inner}")
    else:
        yield name, list(value) if isinstance(value, tuple) else value


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) and value else json.dumps(value, default=str)
    return text if len(text) <= LONGEST_VALUE else text[: LONGEST_VALUE - 3] + "..."
