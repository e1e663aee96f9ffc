"""A reference to an artifact: its kind and the sha256 of its contents. Only these travel between stages."""

from __future__ import annotations

import re
from dataclasses import dataclass

KIND = re.compile(r"[a-z][a-z0-9_]*")
DIGEST = re.compile(r"[0-9a-f]{64}")
SHORT_LENGTH = 12  # 48 bits: no accidental clash in a store of a few million artifacts


@dataclass(frozen=True, order=True)
class Ref:
    """``kind:digest``; equal references mean equal files, whichever stage run made them."""

    kind: str
    digest: str

    def __post_init__(self) -> None:
        if not KIND.fullmatch(self.kind):
            raise ValueError(f"artifact kind {self.kind!r}: use lower-case letters, digits, '_'; a letter first")
        if not DIGEST.fullmatch(self.digest):
            raise ValueError(f"artifact digest {self.digest!r}: need 64 lower-case hexadecimal digits")

    @classmethod
    def parse(cls, text: str) -> Ref:
        """The reference written ``kind:<64 hex digits>``; for a shortened digest use ``Store.resolve``."""
        kind, colon, digest = text.partition(":")
        if not colon:
            raise ValueError(f"artifact reference {text!r}: write kind:digest, or use Store.resolve")
        return cls(kind, digest)

    @property
    def short(self) -> str:
        """The first 12 digits, for tables and messages."""
        return self.digest[:SHORT_LENGTH]

    def __str__(self) -> str:
        return f"{self.kind}:{self.digest}"
