r"""When two answers are equal.

Structure decides first: [0,1) is not (0,1), a set is no tuple, 101_2 is not 101_3, 90 degrees are not 90 radians. What
is left are pairs of values, and equations: those that exact arithmetic does not decide are handed to algebra (`Equal`).
Where the reference and the answer differ in what they leave out (a unit, a base, "x ="), the rest decides.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from functools import partial

from tasks.judging.answer_form import Form, parse
from tasks.judging.latex import clean, words
from tasks.judging.quantities import Quantity, Unit, based_number, exact_number, quantity

Equal = Callable[[str, str], bool | None]
"""Whether two values in LaTeX are equal; None for not known."""

_CHOICE = re.compile(r"\(?\s*([A-J])\s*\)?\.?")
_CHOSEN = re.compile(r"(?:\(\s*([A-J])\s*\)|([A-J])\s*[).:])(?![A-Za-z])(.*)", re.DOTALL)
_ANOTHER_CHOICE = re.compile(r"\([A-J]\)|\b(?:or|and|not)\b")
_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
# A word that says what is called even, red or parallel, and nothing more.
_CALLED = {
    *("function", "functions", "number", "numbers", "integer", "triangle", "angle", "line", "lines", "curve", "set"),
    *("day", "graph", "point", "shape"),
}
_FUNCTION = re.compile(r"y|[a-zA-Z]\([a-z]\)")
# As many per cent where a plain number is asked for may be meant as this number.
_MOST_PERCENT = 1000
_OPAQUE = re.compile(r"\\(?:setminus|cap|backslash|mathbb|infty)(?![a-z])")
_SPLIT_NUMBER = re.compile(r"(?<![\d_^])\d+\s+[\d.]")
_DEGREES_INSIDE = re.compile(r"(\d+(?:\.\d+)?)\s*\^\\circ")
_INDEX = re.compile(r"_|\\(?:sum|prod)(?![a-z])")
_IMAGINARY = re.compile(r"(?<![A-Za-z\\])i(?![A-Za-z])")


def compare(gold: str, answer: str, equal: Equal) -> bool | None:
    """Whether an answer is the reference answer; None where `equal` was asked and does not know."""
    gold, answer = clean(gold), clean(answer)
    if not gold or not answer:
        return False
    chosen = _same_choice(gold, answer)
    if chosen is not None:
        return chosen
    asked, given = parse(gold), parse(answer)
    ask = partial(_ask, equal)
    verdict = _same(asked, given, ask)
    if verdict or "," not in answer:
        return verdict
    return _any([verdict, _same(asked, parse(answer, apart=True), ask)])


def _ask(equal: Equal, gold: str, answer: str) -> bool | None:
    """math-verify drops text: it is asked only where both sides have the same."""
    texts = [sorted(text.strip().casefold() for text in _TEXT.findall(side)) for side in (gold, answer)]
    return equal(gold, answer) if texts[0] == texts[1] else False


def _same_choice(gold: str, answer: str) -> bool | None:
    """Whether the lettered choices are the same; None where not both are choices."""
    gold, answer = _TEXT.sub(r"\1", gold).strip("{} "), _TEXT.sub(r"\1", answer).strip("{} ")
    asked = _CHOICE.fullmatch(gold)
    if asked is None:
        return None
    given = _CHOICE.fullmatch(answer)
    if given is not None:
        return asked.group(1) == given.group(1)
    chosen = _CHOSEN.fullmatch(answer)
    if chosen is None:
        return None
    return asked.group(1) in chosen.groups()[:2] and not _ANOTHER_CHOICE.search(chosen.group(3))


def _same(gold: Form, answer: Form, equal: Equal) -> bool | None:
    if answer.kind == "chain":
        return _every(_same(gold, item, equal) for item in answer.items)
    if gold.kind == "chain":
        return _any(_same(item, answer, equal) for item in gold.items)
    if "equation" in (gold.kind, answer.kind):
        return _same_equation(gold, answer, equal)
    if gold.name and answer.name and gold.name != answer.name and gold.kind in ("group", "union"):
        return False
    if gold.kind == answer.kind:
        return _same_kind(gold, answer, equal)
    kinds = {gold.kind, answer.kind}
    if kinds <= {"list", "set"} or (kinds == {"list", "union"} and _of_pairs(gold) and _of_pairs(answer)):
        return _matched(gold.items, answer.items, equal)
    if kinds == {"list", "group"} and (_in_order(gold) or _in_order(answer) or _is_triple(gold, answer)):
        return _ordered(gold.items, answer.items, equal)
    for one, other in ((gold, answer), (answer, gold)):
        if one.kind in ("set", "list") and len(one.items) == 1 and other.kind == "value":
            return _same(one.items[0], other, equal) if one is gold else _same(other, one.items[0], equal)
    opaque = [_OPAQUE.search(form.text) is not None for form in (gold, answer)]
    if (kinds & {"group", "union"} and all(opaque)) or ("relation" in kinds and ("value" not in kinds or any(opaque))):
        return equal(gold.text, answer.text)
    return False


def _same_equation(gold: Form, answer: Form, equal: Equal) -> bool | None:
    if gold.kind == answer.kind:
        same_name = gold.name == answer.name or (_FUNCTION.fullmatch(gold.name) and _FUNCTION.fullmatch(answer.name))
        verdict = _same(gold.items[0], answer.items[0], equal) if same_name else False
        return verdict or _any([verdict, equal(gold.text, answer.text)])
    if "|" in answer.name:
        return False  # what has this absolute value is another number
    if answer.kind == "equation":
        return equal(gold.text, answer.text) if gold.kind == "relation" else _same(gold, answer.items[0], equal)
    return _same(gold.items[0], answer, equal)


def _same_kind(gold: Form, answer: Form, equal: Equal) -> bool | None:
    if gold.kind == "value":
        return _same_value(gold.text, answer.text, equal)
    if _in_order(gold):
        given = dict(zip(answer.name.split(","), answer.items, strict=False))
        return _ordered(gold.items, [given.get(name, answer) for name in gold.name.split(",")], equal)
    if gold.kind in ("list", "set", "union"):
        return _matched(gold.items, answer.items, equal)
    if gold.kind == "relation":
        return equal(gold.text, answer.text)
    return gold.marks == answer.marks and _ordered(gold.items, answer.items, equal)


def _in_order(form: Form) -> bool:
    """Whether a list names what each of its values is: x = 1, y = 2."""
    return form.kind == "list" and "," in form.name


def _is_triple(gold: Form, answer: Form) -> bool:
    """Whether values without brackets are asked for, and more than two given in those of a tuple: no interval."""
    return gold.kind == "list" and answer.marks == "()" and len(answer.items) > 2


def _of_pairs(form: Form) -> bool:
    return all(item.kind == "group" and len(item.items) == 2 for item in form.items)


def _ordered(golds: Sequence[Form], answers: Sequence[Form], equal: Equal) -> bool | None:
    if len(golds) != len(answers):
        return False
    return _every(_same_row(gold, answer, equal) for gold, answer in zip(golds, answers, strict=True))


def _same_row(gold: Form, answer: Form, equal: Equal) -> bool | None:
    """Rows of a matrix, which are lists in order without a text of their own, or items."""
    row = gold.kind == answer.kind == "list" and not gold.text and not answer.text
    return _ordered(gold.items, answer.items, equal) if row else _same(gold, answer, equal)


def _matched(golds: Sequence[Form], answers: Sequence[Form], equal: Equal) -> bool | None:
    """Whether each answer is another gold; the first that fits will do, as equal things are all equal."""
    if len(golds) != len(answers):
        return False
    left, known = list(answers), True
    for gold in golds:
        verdicts = [_same(gold, answer, equal) for answer in left]
        if True in verdicts:
            del left[verdicts.index(True)]
        elif None in verdicts:
            known = False
        else:
            return False
    return True if known else None


def _any(verdicts: Iterable[bool | None]) -> bool | None:
    found = list(verdicts)
    return True if True in found else None if None in found else False


def _every(verdicts: Iterable[bool | None]) -> bool | None:
    """And, where what is not known may be either. All are looked at, so that all questions are asked at once."""
    found = list(verdicts)
    return False if False in found else None if None in found else True


def _same_value(gold: str, answer: str, equal: Equal) -> bool | None:
    if _plain(gold) == _plain(answer):
        return True
    asked, given = words(gold), words(answer)
    if asked or given:
        bare = r"\text" not in gold + answer
        return _same_words(asked, given) or (bare and equal(gold, answer))
    based = based_number(gold), based_number(answer)
    if any(based):
        return _same_base(gold, answer, *based)
    return _same_quantity(quantity(gold), quantity(answer), equal)


def _plain(text: str) -> str:
    """Without text's wrapping and blanks, but for those between two digits."""
    return re.sub(r"\s+(?![\d.])|(?<!\d)\s+", "", _TEXT.sub(r"\1", text))


def _same_words(asked: list[str], given: list[str]) -> bool:
    return given == asked or (given[:-1] == asked and bool(asked) and given[-1] in _CALLED)


def _same_base(gold: str, answer: str, asked: tuple[str, int] | None, given: tuple[str, int] | None) -> bool:
    """A base that the reference names may be left out; one that only the answer names gives its value."""
    if asked and given:
        return asked == given
    if asked:
        return answer.strip().upper().lstrip("0") == asked[0]
    assert given is not None
    return exact_number(gold) == int(*given)


def _same_quantity(gold: Quantity, answer: Quantity, equal: Equal) -> bool | None:
    if not _comparable(gold.unit, answer.unit):
        return False
    if _is_turn(gold, answer) or _is_turn(answer, gold):
        return equal(_for_algebra(gold, _is_turn(gold, answer)), _for_algebra(answer, _is_turn(answer, gold)))
    left, right = exact_number(gold.value), exact_number(answer.value)
    if left is None or right is None:
        if _SPLIT_NUMBER.search(gold.value + "|" + answer.value):
            return False  # two numbers that stand side by side
        same_units = bool(gold.unit and answer.unit and gold.unit.dimension and answer.unit.dimension)
        return equal(_for_algebra(gold, scaled=same_units), _for_algebra(answer, scaled=same_units))
    left, right = left * gold.scale, right * answer.scale
    if gold.unit and answer.unit:
        return left * gold.unit.factor == right * answer.unit.factor
    if answer.unit and answer.unit.dimension == "percent":
        return _same_percent(left, right)
    return left == right or bool(gold.unit and gold.unit.dimension == "percent" and left == right * 100)


def _comparable(gold: Unit | None, answer: Unit | None) -> bool:
    """Whether the two count the same kind of thing, so far as can be known; words that are no unit must share one."""
    if gold is None or answer is None or not (gold.dimension or answer.dimension):
        return gold is None or answer is None or bool(gold.names & answer.names)
    if {gold.dimension, answer.dimension} == {"degrees", "radians"} or not (gold.dimension and answer.dimension):
        return "percent" not in (gold.dimension, answer.dimension)
    return gold.dimension == answer.dimension


def _same_percent(gold: Fraction, percent: Fraction) -> bool:
    """Whether so many per cent are meant where the reference has no sign: 25% for 25 and for 1/4, not for 2500%."""
    as_written = gold == percent and 1 <= abs(gold) <= _MOST_PERCENT
    return as_written or ((gold.denominator > 1 or abs(gold) <= 1) and gold == percent / 100)


def _is_turn(one: Quantity, other: Quantity) -> bool:
    """Whether one is in degrees and the other in radians, said or seen by its pi."""
    degrees = one.unit is not None and one.unit.dimension == "degrees"
    return degrees and (other.unit.dimension == "radians" if other.unit else r"\pi" in other.value)


def _for_algebra(asked: Quantity, turned: bool = False, scaled: bool = False) -> str:
    """The value as math-verify reads it best: numbers as fractions, angles in radians, i as a root."""
    number = exact_number(asked.value)
    text = asked.value if number is None else f"\\frac{{{number.numerator}}}{{{number.denominator}}}"
    text = _DEGREES_INSIDE.sub(r"\\left(\\frac{\1 \\pi}{180}\\right)", text)
    if not _INDEX.search(text):
        text = _IMAGINARY.sub(r" \\sqrt{-1} ", text)
    factor = asked.scale * (asked.unit.factor if asked.unit and scaled else 1)
    if not turned and factor == 1:
        return text
    top, bottom = (f"{factor.numerator} \\cdot \\pi", 180) if turned else (str(factor.numerator), 1)
    return f"\\frac{{{top}}}{{{factor.denominator * bottom}}} \\cdot \\left({text}\\right)"
