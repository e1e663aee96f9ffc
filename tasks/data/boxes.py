"""Where a text says its answer: in the last \\boxed{...}. Data, rewards and scores read it alike."""

import re

# Two backslashes: models often escape twice.
_BRACE_TOKEN = re.compile(r"\\{1,2}boxed\s*\{|\\.|[{}]", re.DOTALL)


def last_boxed(text: str) -> str | None:
    r"""Content of the last complete \boxed{...}. Linear in the text's length."""
    open_braces: list[int | None] = []  # where a box's content starts; None for other braces
    best: tuple[int, int] | None = None
    for token in _BRACE_TOKEN.finditer(text):
        if "boxed" in token.group():
            open_braces.append(token.end())
        elif token.group() == "{":
            open_braces.append(None)
        elif token.group() == "}" and open_braces:
            start = open_braces.pop()
            if start is not None and (best is None or start > best[0]):
                best = (start, token.start())
    return None if best is None else text[best[0] : best[1]].strip()
