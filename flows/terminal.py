"""The one place that prints: what comes from data reaches a terminal as text, never as commands to it.

Problem ids, labels, model output and file names are hostile: ESC sequences among them can retitle a terminal, write
its clipboard or hide text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

HOSTILE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
"""Control characters but tab and line feed, and what reverses the direction of text."""
SHOWN = "\ufffd"


def visible(text: str) -> str:
    """`text` with every character that a terminal would obey replaced."""
    return HOSTILE.sub(SHOWN, text)


class SafeConsole(Console):
    """A console that prints control characters and direction overrides as U+FFFD; rich's own controls do their work."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Every path to the terminal goes through here: print, tables, live bars."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)


console, errors = SafeConsole(), SafeConsole(stderr=True)
