"""What kind of thing an answer is: a value, list, set, tuple or interval, union, matrix, equation, relation."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from tasks.judging.latex import closing, split, unwrapped
from tasks.judging.quantities import exact_number

Kind = Literal["value", "list", "set", "group", "union", "matrix", "equation", "chain", "relation"]


@dataclass(frozen=True)
class Form:
    """`text`: as written. `name`: what is said to be it, "x" of x = 5 or of x > 2. `marks`: a group's two brackets."""

    kind: Kind
    text: str
    items: tuple["Form", ...] = ()
    marks: str = ""
    name: str = ""


_COMMA = re.compile(r"[,;]")
_WORDED = re.compile(r"\\text\s*\{\s*,?\s*(and|or)\s*\}|(?<=[\s\d)}])(and|or)(?=[\s\d\\(])")
_RELATION = re.compile(r"[=<>]|\\(?:approx|ne|le|ge|in|sim)(?![a-z])")
_CUP = re.compile(r"\\cup(?![a-z])")
_BAR = re.compile(r"\||:")
_ROWS, _CELLS = re.compile(r"\\\\|\\cr(?![a-z])"), re.compile("&")
_MATRIX = re.compile(r"\\begin\{([pbBvV]?matrix|array)\}(?:\s*\{[clr|\s]*\})?(.*)\\end\{\1\}", re.DOTALL)
_SIMPLE_NAME = re.compile(
    r"[A-Za-z](?:_\{?\w+\}?)?'*(?:\s*\(\s*[a-z]\s*\))?|\\(?:alpha|beta|gamma|theta|lambda|mu|phi|varphi|omega|ell)"
)
_NUMERIC_COMMANDS = re.compile(r"\\(?:frac|sqrt|pi|cdot|times|binom|div|pm|log|ln|sin|cos|tan|text\{[^{}]*\}|%|\$|,)")
_OPEN = {"(": "(", "[": "[", r"\{": "{", r"\langle": "<"}
_CLOSE = {")": ")", "]": "]", r"\}": "}", r"\rangle": ">"}
_FLIPPED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}
_REALS = re.compile(r"\\mathbb\s*\{?R\}?|\\text\{\s*all real numbers\s*\}")
_SIGNS = re.compile(r"\\(pm|mp)(?![a-z])")
_MOST_SIGNS = 3


def parse(answer: str, apart: bool = False) -> Form:
    """The form of an answer in clean()'s spelling; `apart`: no comma between digits groups them."""
    text = unwrapped(answer)
    if r"\text" in text and exact_number(text) is not None:  # 2 and 1/4
        return Form("value", text)
    for reader in (_list, _related, _union, _matrix, _bracketed, _signed):
        if (form := reader(text, apart)) is not None:
            return form
    if _REALS.fullmatch(text):
        return Form("group", text, (Form("value", r"-\infty"), Form("value", r"\infty")), "()")
    return Form("set", text, (), "{}") if text in (r"\emptyset", r"\{\}", r"\{ \}") else Form("value", text)


def _list(text: str, apart: bool) -> Form | None:
    parts, joints = split(text, _WORDED)
    if len(parts) > 1 and all(part.strip(" ,;") for part in parts):
        forms = [parse(part.strip(" ,;"), apart) for part in parts]
        conjunction = "or" if any("or" in joint for joint in joints) else "and"
        return _half_lines(text, forms, conjunction) or _flat(text, forms)
    parts = _comma_parts(text, apart, inside=False)
    if len(parts) < 2 or not all(part.strip() for part in parts):
        return None
    forms = [parse(part, apart) for part in parts]
    return _half_lines(text, forms, "") or _flat(text, forms)


def _flat(text: str, forms: Sequence[Form]) -> Form:
    """A list, where lists within it (3, 1 \\pm 2) are no further level; what one name is said to be is without it."""
    items = [item for form in forms for item in (form.items if form.kind == "list" else (form,))]
    if all(item.kind == "equation" for item in items):
        names = [item.name for item in items]
        items = [item.items[0] for item in items]
        items = [inner for item in items for inner in (item.items if item.kind == "list" else (item,))]
        return Form("list", text, tuple(items), name="" if len(set(names)) == 1 else ",".join(names))
    if items and items[0].kind == "equation" and all(item.kind == "value" for item in items[1:]):
        items[0] = items[0].items[0]  # x = 1, 2
    return Form("list", text, tuple(items))


def _comma_parts(text: str, apart: bool, inside: bool) -> list[str]:
    """The parts between commas, where those that group a number's digits are none.

    Outside brackets "1,234" is one number. Else a comma without a blank groups digits where others have a blank.
    """
    parts, marks = split(text, _COMMA)
    spaced = any(part.startswith(" ") for part in parts[1:])
    if apart or len(parts) < 2 or ";" in marks:
        return parts
    merged = [parts[0]]
    for part in parts[1:]:
        if re.match(r"\d{3}(?!\d)", part) and re.search(r"(?<![\d.])\d{1,3}(?:,\d{3})*$", merged[-1]):
            merged[-1] += f",{part}"
        else:
            merged.append(part)
    return merged if spaced or (not inside and len(merged) == 1) else parts


def _related(text: str, apart: bool) -> Form | None:
    parts, signs = split(text, _RELATION)
    sides = [part.strip() for part in parts]
    if not signs:
        return None
    near = [sign in (r"\approx", r"\sim") for sign in signs]
    if any(near):
        return _approximate(sides, signs, near.index(True), apart)
    if not all(sides):
        return Form("relation", text)
    if signs[0] == r"\in" and len(signs) == 1:
        return replace(parse(sides[1], apart), name=sides[0])
    if set(signs) == {"="}:
        return _equation(text, sides, apart)
    return _interval(text, sides, signs) or Form("relation", text)


def _approximate(sides: list[str], signs: list[str], cut: int, apart: bool) -> Form:
    """What stands before the sign: a value and its rounding are not two answers."""
    kept = sides[: cut + 1] if sides[cut] and (cut or not _is_name(sides[0])) else sides[cut + 1 : cut + 2]
    joined = kept[0] + "".join(f" {sign} {side}" for sign, side in zip(signs, kept[1:], strict=False))
    return parse(joined, apart) if kept[0] else Form("relation", joined)


def _equation(text: str, sides: list[str], apart: bool) -> Form:
    if not _is_name(sides[0]):
        if len(sides) == 2 and _SIMPLE_NAME.fullmatch(sides[1]):
            sides = sides[::-1]
        else:
            return Form("chain", text, tuple(parse(side, apart) for side in sides))
    rest = sides[1:] if not any(map(_is_name, sides[1:])) else sides[-1:]
    value = parse(rest[0], apart) if len(rest) == 1 else Form("chain", text, tuple(parse(side, apart) for side in rest))
    return Form("equation", text, (value,), name=re.sub(r"\s", "", sides[0]))


def _is_name(side: str) -> bool:
    """Whether it has a letter that is no number's."""
    return re.search(r"[A-Za-z]", _NUMERIC_COMMANDS.sub("", side).replace("e", "").replace("i", "")) is not None or (
        r"\text" in side and not re.search(r"\d", side)
    )


def _interval(text: str, sides: list[str], signs: list[str]) -> Form | None:
    r"""2 < x, 1 \le x < 2 and x \ne 3 as intervals."""
    if len(signs) == 1 and _SIMPLE_NAME.fullmatch(sides[1]):
        sides, signs = sides[::-1], [_FLIPPED.get(signs[0], signs[0])]
    named = [side for side in sides if _SIMPLE_NAME.fullmatch(side)]
    if len(signs) == 1 and sides[0] in named and len(named) == 1:
        if signs[0] == r"\ne":
            halves = (_between(r"-\infty", "<", sides[1], "<"), _between(sides[1], "<", r"\infty", "<"))
            return Form("union", text, halves, name=named[0])
        bounds = (r"-\infty", "<", sides[1], signs[0]) if signs[0] in ("<", r"\le") else None
        low = bounds or (sides[1], _FLIPPED[signs[0]], r"\infty", "<")
        return replace(_between(*low), text=text, name=named[0]) if signs[0] in _FLIPPED else None
    if len(signs) == 2 and sides[1] in named and len(named) == 1 and all(sign in _FLIPPED for sign in signs):
        if signs[0] in (">", r"\ge"):
            sides, signs = sides[::-1], [_FLIPPED[sign] for sign in signs[::-1]]
        if signs[0] in ("<", r"\le") and signs[1] in ("<", r"\le"):
            return replace(_between(sides[0], signs[0], sides[2], signs[1]), text=text, name=named[0])
    return None


def _between(low: str, first: str, high: str, second: str) -> Form:
    marks = ("(" if first == "<" else "[") + (")" if second == "<" else "]")
    return Form("group", f"{marks[0]}{low},{high}{marks[1]}", (parse(low), parse(high)), marks)


def _half_lines(text: str, forms: Sequence[Form], conjunction: str) -> Form | None:
    """Inequalities side by side: with "or" a union; a lower and an upper bound of one name else an interval."""
    if len({form.name for form in forms}) != 1 or not all(form.name and len(form.items) == 2 for form in forms):
        return None
    lower = [form for form in forms if form.items[1].text == r"\infty"]
    upper = [form for form in forms if form.items[0].text == r"-\infty"]
    if conjunction != "or" and len(lower) == len(upper) == 1 and len(forms) == 2:
        low, high = exact_number(lower[0].items[0].text), exact_number(upper[0].items[1].text)
        if conjunction == "and" or (low is not None and high is not None and low < high):
            marks = lower[0].marks[0] + upper[0].marks[1]
            return Form("group", text, (lower[0].items[0], upper[0].items[1]), marks, forms[0].name)
    return Form("union", text, tuple(replace(form, name="") for form in forms), name=forms[0].name)


def _union(text: str, apart: bool) -> Form | None:
    parts, signs = split(text, _CUP)
    return Form("union", text, tuple(parse(part, apart) for part in parts)) if signs else None


def _matrix(text: str, apart: bool) -> Form | None:
    outer = _inner(text)
    match = _MATRIX.fullmatch(outer[1].strip() if outer else text)
    if match is None or match.group(1) in ("vmatrix", "Vmatrix"):
        return None
    rows = [split(row, _CELLS)[0] for row in split(match.group(2), _ROWS)[0] if row.strip()]
    cells = [Form("list", "", tuple(parse(cell, apart) for cell in row)) for row in rows]
    return Form("matrix", text, tuple(cells))


def _inner(text: str) -> tuple[str, str] | None:
    """The kind of the brackets around all of a text, and what is in them."""
    for mark, opening in _OPEN.items():
        if text.startswith(mark):
            end = closing(text, 0)
            if end > 0 and text[end:] in _CLOSE:
                return opening + _CLOSE[text[end:]], text[len(mark) : end]
    return None


def _bracketed(text: str, apart: bool) -> Form | None:
    found = _inner(text)
    if found is None or not found[1].strip():
        return None
    marks, content = found
    if marks == "{}":
        parts, bars = split(content, _BAR)
        if len(bars) == 1 and len(parts) == 2 and _RELATION.search(parts[1]):
            return parse(parts[1], apart)
        items = [parse(part, apart) for part in _comma_parts(content, apart, inside=True)]
        return Form("set", text, _flat(text, items).items, marks)
    parts = _comma_parts(content, apart, inside=True)
    if len(parts) == 1:
        return parse(content, apart) if marks == "()" else None
    return Form("group", text, tuple(parse(part, apart) for part in parts), marks)


def _signed(text: str, apart: bool) -> Form | None:
    r"""a \pm b as a list of two; \mp is the other sign of the \pm before it."""
    signs = [match.group(1) for match in _SIGNS.finditer(text)]
    if not signs or len(signs) > _MOST_SIGNS:
        return None
    joined = "mp" in signs
    choices = range(2) if joined else range(2 ** len(signs))
    forms = []
    for choice in choices:
        plus = iter([(choice if joined else choice >> i) % 2 == (sign == "mp") for i, sign in enumerate(signs)])
        forms.append(parse(re.sub(r"^\s*\+", "", _SIGNS.sub(lambda _: "+" if next(plus) else "-", text)), apart))  # noqa: B023
    return Form("list", text, tuple(forms))
