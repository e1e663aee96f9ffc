"""What makes two stage runs the same: canonical bytes of plain data (of the code: `artifacts.code`).

The canonical form is tagged and length-prefixed, so different values never share bytes: 1, 1.0, True and "1"
differ, ["a", "b"] and ["ab"] differ. Dictionary order is free, and a list equals a tuple, so that a payload
read back from JSON has the key it was written under.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent


def canonical(obj: object) -> bytes:
    """Tagged canonical bytes of None, bool, int, finite float, str, bytes, and lists, tuples, dicts of them.

    Raises TypeError for any other type (subclasses too), ValueError for NaN and infinities, naming the place.
    """
    return b"".join(_encode(obj, "value"))


def digest(obj: object) -> str:
    """sha256 of ``canonical(obj)``, 64 hexadecimal digits."""
    return hashlib.sha256(canonical(obj)).hexdigest()


def _encode(obj: object, where: str) -> Iterator[bytes]:
    if isinstance(obj, list | tuple) and type(obj) in (list, tuple):
        yield b"l%d:" % len(obj)
        for index, item in enumerate(obj):
            yield from _encode(item, f"{where}[{index}]")
    elif isinstance(obj, dict) and type(obj) is dict:
        if not all(type(name) is str for name in obj):
            raise TypeError(f"{where}: dictionary keys must be str to enter a key; got {list(obj)}")
        yield b"d%d:" % len(obj)
        for name in sorted(obj):
            yield _tagged_bytes(b"s", name.encode("utf-8", "surrogatepass"))
            yield from _encode(obj[name], f"{where}.{name}")
    else:
        yield _encode_scalar(obj, where)


def _encode_scalar(obj: object, where: str) -> bytes:
    # Exact types: a numpy scalar or an enum that subclasses float or str would pass isinstance.
    if obj is None:
        return b"n;"
    if type(obj) is bool:
        return b"b1;" if obj else b"b0;"
    if type(obj) is int:
        return b"i%d;" % obj
    if type(obj) is float:
        if not math.isfinite(obj):
            raise ValueError(f"{where}: {obj} cannot enter a key; use None for 'no limit'")
        return b"f" + obj.hex().encode() + b";"
    if type(obj) is str:
        return _tagged_bytes(b"s", obj.encode("utf-8", "surrogatepass"))
    if type(obj) is bytes:
        return _tagged_bytes(b"y", obj)
    raise TypeError(
        f"{where}: {type(obj).__module__}.{type(obj).__qualname__} cannot enter a key; "
        "convert it to None, bool, int, float, str, bytes, list or dict first (a Ref by str)"
    )


def _tagged_bytes(tag: bytes, content: bytes) -> bytes:
    return tag + b"%d:" % len(content) + content
