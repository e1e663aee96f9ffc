r"""An answer's LaTeX in one spelling, and cut at the marks that stand outside all brackets.

Blanks are kept: what stands between two digits decides what number they are. "1 1/2" is three halves, "1\,234" is one
number and "2, 100" are two.
"""

import re

_OPENING = {"(", "[", "{", r"\{", r"\langle", r"\lvert", r"\begin"}
_CLOSING = {")", "]", "}", r"\}", r"\rangle", r"\rvert", r"\end"}

# One spelling for each sign; a thin blank is told apart from others, as it groups digits.
_SIGNS = str.maketrans(
    {
        "\N{MINUS SIGN}": "-",
        "\N{EN DASH}": "-",
        "\N{DEGREE SIGN}": r"^\circ ",
        "\N{MULTIPLICATION SIGN}": r"\times ",
        "\N{MIDDLE DOT}": r"\cdot ",
        "\N{DOT OPERATOR}": r"\cdot ",
        "\N{PLUS-MINUS SIGN}": r"\pm ",
        "\N{INFINITY}": r"\infty ",
        "\N{UNION}": r"\cup ",
        "\N{LESS-THAN OR EQUAL TO}": r"\le ",
        "\N{GREATER-THAN OR EQUAL TO}": r"\ge ",
        "\N{NOT EQUAL TO}": r"\ne ",
        "\N{ALMOST EQUAL TO}": r"\approx ",
        "\N{ELEMENT OF}": r"\in ",
        "\N{EMPTY SET}": r"\emptyset ",
        "\N{GREEK SMALL LETTER PI}": r"\pi ",
        "\N{HORIZONTAL ELLIPSIS}": r"\ldots ",
        "\N{THIN SPACE}": r"\,",
        "\N{NARROW NO-BREAK SPACE}": r"\,",
        "\N{NO-BREAK SPACE}": " ",
    }
)
_SPELLINGS = {
    **dict.fromkeys(("dfrac", "tfrac", "cfrac"), "frac"),
    **dict.fromkeys(("leq", "leqslant"), "le"),
    **dict.fromkeys(("geq", "geqslant"), "ge"),
    **dict.fromkeys(("varnothing",), "emptyset"),
    **dict.fromkeys(("dots", "cdots", "dotsc"), "ldots"),
    **dict.fromkeys(("textbf", "textit", "textrm", "textsf", "texttt", "mbox", "mathrm", "mathsf"), "text"),
    **{"neq": "ne", "bar": "overline", "operatorname": "text", "textnormal": "text"},
}
_REPLACED = {"lt": "<", "gt": ">", "lbrace": r"\{", "rbrace": r"\}", "lbrack": "[", "rbrack": "]", "mid": "|"} | {
    **dict.fromkeys(("degree", "textdegree"), r"^\circ "),
    **{"colon": ":", "vert": "|", "lor": r"\text{ or }", "vee": r"\text{ or }", "land": r"\text{ and }"},
    **{"cent": "¢", "euro": "€", "pounds": "£", "textdollar": r"\$", "imath": "i"},
}
# What changes the look alone: commands without, with one and with two arguments, of which the last is shown.
_LOOKS = {
    *("left", "right", "big", "Big", "bigg", "Bigg", "bigl", "bigr", "Bigl", "Bigr", "displaystyle", "textstyle"),
    *("tiny", "small", "normalsize", "large", "Large", "LARGE", "huge", "Huge", "bf", "rm", "it", "bfseries", "limits"),
}
_WRAPPERS = {"mathbf", "boldsymbol", "bm", "mathit", "mathnormal", "underline", "boxed", "fbox", "ensuremath", "pmb"}
_COLOURS = re.compile(r"\\(?:textcolor|colorbox|color)\s*\{[^{}]*\}")
_BLANKS = {"quad", "qquad", "enspace", "thinspace", "space", "hfill"}
# The end of a row is no command.
_COMMAND = re.compile(r"\\\\|\\([A-Za-z]+) ?")
_SPACING = re.compile(r"(\\\\)|\\[,;: ]|~|\\hspace\*?\{[^{}]*\}|\s+")
# Digits in groups of three, with marks that stand for nothing else: 1{,}234, 1,\!234 and 1\,234.
_GROUPED = re.compile(r"(?<![\d.,])\d{1,3}(?:(?:\{,\}|,\\!|\\,)\s*\d{3})+(?!\d)")
_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
_LABEL = re.compile(r"^\s*\\text\s*\{[^{}]*(?::|\bis)\s*\}(?=\s*\S)")
_NATURAL_LOGARITHM = re.compile(r"\\log\s*_\s*(?:\{\s*e\s*\}|e)(?![a-z])")
_SHORT_FRACTION = re.compile(r"\\frac\s*(?:\{([^{}]*)\}|([0-9A-Za-z]))\s*(?:\{([^{}]*)\}|([0-9A-Za-z]))")
_DEGREE = re.compile(r"(?:\{\s*\})?\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![a-z]))")
# ]0,1[ as (0,1)
_FRENCH_OPEN = re.compile(r"(?:^|(?<=\\cup)|(?<=\\in))\s*\](?=[^\[\]()]*,[^\[\]()]*[\[\]])")
_FRENCH_CLOSED = re.compile(r"(?<=[\d}A-Za-z])\s*\[(?=\s*(?:$|\\cup))")


def clean(answer: str) -> str:
    """The answer in one spelling: without sizes, fonts, colours and mathematics' own delimiters, blanks as one."""
    text = answer.translate(_SIGNS).replace("...", r"\ldots ")
    if r"\begin" not in text:  # no rows: a model that escapes twice
        text = text.replace(r"\\", "\\")
    text = _GROUPED.sub(lambda match: re.sub(r"[^\d]", "", match.group()), text).replace(r"\!", "")
    text = _without_delimiters(_COLOURS.sub("", text))
    text = _SPACING.sub(lambda match: match.group(1) or " ", _COMMAND.sub(_spelling, text))
    text = _FRENCH_CLOSED.sub(")", _FRENCH_OPEN.sub(" (", text))
    text = _DEGREE.sub(r"^\\circ ", text.replace("{:}", ":"))
    text = _SHORT_FRACTION.sub(_whole_fraction, _TEXT.sub(_text, text))
    text = _NATURAL_LOGARITHM.sub(r"\\ln ", text)
    return unwrapped(_LABEL.sub("", text).strip().rstrip(".;, "))


def unwrapped(text: str) -> str:
    """The text without braces that enclose all of it."""
    text = text.strip()
    while text.startswith("{") and text.endswith("}") and closing(text, 0) == len(text) - 1:
        text = text[1:-1].strip()
    return text


def closing(text: str, start: int) -> int:
    """Where the bracket that opens at `start` closes, whatever its kind; -1 for nowhere."""
    depth = 0
    for mark in _MARK.finditer(text, start):
        depth += _step(mark.group())
        if depth == 0:
            return mark.start()
    return -1


def _step(mark: str) -> int:
    return (mark in _OPENING) - (mark in _CLOSING)


def split(text: str, separator: re.Pattern[str]) -> tuple[list[str], list[str]]:
    """The parts between separators outside all brackets and environments, and these separators."""
    parts, separators, start, depth = [], [], 0, 0
    marks = _MARK.finditer(text)
    mark = next(marks, None)
    for match in separator.finditer(text):
        while mark is not None and mark.start() < match.start():
            depth += _step(mark.group())
            last, mark = mark.end(), next(marks, None)
            if last > match.start():
                break  # the separator is part of a mark
        else:
            if depth <= 0:
                parts.append(text[start : match.start()])
                separators.append(match.group().strip())
                start = match.end()
    return [*parts, text[start:]], separators


def words(text: str) -> list[str]:
    """The words of a text that is nothing else, without articles; none for anything else, as a product of letters."""
    plain = _TEXT.sub(r" \1 ", text).strip()
    if not re.fullmatch(r"[^\W\d_][^\W\d_]+(?:[\s'.-]+[^\W\d_]+)*[.!]?", plain) or (plain == text and len(plain) < 3):
        return []
    return [word for word in re.findall(r"[^\W_]+(?:['-][^\W_]+)*", plain.casefold()) if word not in ("the", "a", "an")]


_MARK = re.compile(r"\\(?:[{}]|langle|rangle|lvert|rvert|begin|end)(?![A-Za-z])|\\.|[()\[\]{}]", re.DOTALL)


def _without_delimiters(text: str) -> str:
    """Without the dollars and brackets around mathematics; a lone dollar is money."""
    text = re.sub(r"\\[()]|\\\[|\\\](?!\d)", "", text)
    dollars = re.findall(r"(?<!\\)\$", text)
    return re.sub(r"(?<!\\)\$", r"\\$" if len(dollars) == 1 else "", text)


def _spelling(match: re.Match[str]) -> str:
    if (name := match.group(1)) is None:
        return match.group()
    rest = " " if match.group().endswith(" ") else ""
    if name in _LOOKS or name in _WRAPPERS:
        return rest
    if name in _BLANKS:
        return " "
    return _REPLACED[name] + rest if name in _REPLACED else f"\\{_SPELLINGS.get(name, name)}{rest}"


def _text(match: re.Match[str]) -> str:
    """Text without letters, or one letter that is a constant, is mathematics."""
    content = match.group(1)
    if content.strip() in ("e", "i", "x"):
        return content
    if not re.search(r"[^\W\d_]", content):
        return f"{{{content.strip()}}}" if re.search(r"\d", content) else content
    return f"\\text{{{content}}}"


def _whole_fraction(match: re.Match[str]) -> str:
    numerator, denominator = match.group(1) or match.group(2) or "", match.group(3) or match.group(4) or ""
    return f"\\frac{{{numerator.strip()}}}{{{denominator.strip()}}}"
