"""A chat template rendered by a process of its own, so that one without end or measure harms nobody.

Run as a script by `templates.py`: reads {"template", "variables", "most_chars", "cpu_seconds", "memory_bytes"} from
standard input.  Exit status 0 says that the template ends, TOO_MUCH (or death by the limit on CPU time) that it takes
more than its share; any other error is told by the real rendering.
"""

from __future__ import annotations

import json
import resource
import sys
from typing import Any

import jinja2
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

TOO_MUCH = 3


class _Generation(Extension):
    """The tag {% generation %} of transformers' templates: marks the assistant's tokens, writes nothing itself."""

    tags = {"generation"}  # noqa: RUF012  # as jinja2 declares it

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def main() -> int:
    asked = json.load(sys.stdin)
    resource.setrlimit(resource.RLIMIT_CPU, (asked["cpu_seconds"],) * 2)
    resource.setrlimit(resource.RLIMIT_AS, (asked["memory_bytes"],) * 2)
    try:
        template = _environment().from_string(asked["template"])
        for variables in asked["variables"]:
            written = 0
            for piece in template.generate(**variables):
                written += len(piece)
                if written > asked["most_chars"]:
                    return TOO_MUCH
    except MemoryError:
        return TOO_MUCH
    except Exception:
        return 0
    return 0


def _environment() -> ImmutableSandboxedEnvironment:
    """As transformers' (utils/chat_template_utils.py)."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False)
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: form
    return environment


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


if __name__ == "__main__":
    sys.exit(main())
