"""Texts from outside (columns, file names, values, libraries' errors) inside messages: one line, printable, short."""

from __future__ import annotations

from collections.abc import Iterable

MOST_CHARS = 300
"""Of a message; what is longer is not read."""


def shorten(text: object, most: int = 80) -> str:
    """`text` on one line of at most `most` characters, without characters that a terminal would obey."""
    line = " ".join(str(text)[: 4 * most].split())
    line = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in line)
    return line if len(line) <= most else line[: most - 1] + "…"


def listed(names: Iterable[str], most: int = 120) -> str:
    """As many names as fit into `most` characters, and how many more there are."""
    names = [shorten(name, 40) for name in names]
    shown: list[str] = []
    while len(shown) < len(names) and len(", ".join([*shown, names[len(shown)]])) <= most:
        shown.append(names[len(shown)])
    rest = len(names) - len(shown)
    return ", ".join(shown) + (f" and {rest} more" if rest else "")


def first_line(error: BaseException, most: int = 100) -> str:
    """The kind of an error and the first line of its message."""
    lines = str(error).strip().splitlines() or [""]
    return shorten(f"{type(error).__name__}: {lines[0]}" if lines[0] else type(error).__name__, most)
