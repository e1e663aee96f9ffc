r"""Numbers that are known exactly, and what they count: units, money, per cent, number bases."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

_DECIMAL = r"(?:\d+\.?\d*|\.\d+)"
_SIGN = re.compile(r"\s*([+-]?)\s*(.*)", re.DOTALL)
_PLAIN = re.compile(_DECIMAL)
_THOUSANDS = re.compile(r"\d{1,3}(?:(?:,\d{3})+|(?: \d{3})+)(?:\.\d+)?")
_RATIO = re.compile(rf"({_DECIMAL})\s*/\s*([+-]?\s*{_DECIMAL})")
_FRACTION = re.compile(rf"\\frac\{{\s*([+-]?\s*{_DECIMAL})\s*\}}\{{\s*([+-]?\s*{_DECIMAL})\s*\}}")
_MIXED = re.compile(r"(\d+)\s*(?:\\frac\{(\d+)\}\{(\d+)\}|(?:\s|\\text\{ ?and ?\})\s*(\d+)\s*/\s*(\d+))")
_SCIENTIFIC = re.compile(
    rf"(?:({_DECIMAL})\s*(?:\\times|\\cdot|\*)\s*)?10\s*\^\s*(?:\{{\s*([+-]?\s*\d+)\s*\}}|(\d))|({_DECIMAL})[eE]([+-]?\d+)"
)
_REPEATING = re.compile(
    r"(\d*)\.(\d*)(?:\\overline\s*\{?\s*(\d+)\s*\}?|\((\d+)\)|((?:\\dot\s*\{?\d\}?\d*)+))(?:\s*\\ldots)?"
)
_ELLIPSIS = re.compile(r"(\d*)\.(\d+?)\s*\\ldots")
_MOST_EXPONENT = 400
_BASED = re.compile(
    r"[({]*\s*(?:\\text\s*\{)?\s*(\w+)\s*[)}]*\s*_\s*(?:\{\s*\(?\s*(?:\\text\s*\{)?\s*(\w+)\s*\}?\s*\)?\s*\}|(\d))"
)
_BASE_WORDS = {
    **{"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10},
    **{"eleven": 11, "twelve": 12, "sixteen": 16},
}


def exact_number(text: str) -> Fraction | None:
    """The value of an integer, decimal, repeating decimal, fraction, mixed number or power of ten; None for others."""
    match = _SIGN.fullmatch(text)
    assert match is not None
    value = _magnitude(match.group(2).strip())
    return None if value is None else -value if match.group(1) == "-" else value


def based_number(text: str) -> tuple[str, int] | None:
    r"""The digits and the base of 2516_8, 101_{2}, 12_{\text{five}}; None for anything else."""
    match = _BASED.fullmatch(text)
    if match is None:
        return None
    digits, base = match.group(1).upper(), match.group(2) or match.group(3)
    number = int(base) if base.isdecimal() and len(base) < 3 else _BASE_WORDS.get(base.lower(), 0)
    if not 2 <= number <= 36 or not digits.isascii() or any(int(digit, 36) >= number for digit in digits):
        return None
    return digits.lstrip("0") or "0", number


def _magnitude(text: str) -> Fraction | None:
    if _PLAIN.fullmatch(text):
        return Fraction(text)
    if _THOUSANDS.fullmatch(text):
        return Fraction(re.sub("[, ]", "", text))
    if match := _RATIO.fullmatch(text) or _FRACTION.fullmatch(text):
        return _divided(*match.groups())
    if match := _MIXED.fullmatch(text):
        whole, *parts = (part for part in match.groups() if part is not None)
        fraction = _divided(*parts)
        return int(whole) + fraction if fraction is not None and fraction < 1 else None
    if match := _SCIENTIFIC.fullmatch(text):
        mantissa, exponent = match.group(1) or match.group(4) or "1", match.group(2) or match.group(3) or match.group(5)
        power = int(exponent.replace(" ", "")) if len(exponent) < 9 else _MOST_EXPONENT + 1
        return Fraction(mantissa) * Fraction(10) ** power if abs(power) <= _MOST_EXPONENT else None
    return _repeating(text)


def _divided(numerator: str, denominator: str) -> Fraction | None:
    below = Fraction(denominator.replace(" ", ""))
    return Fraction(numerator.replace(" ", "")) / below if below else None


def _repeating(text: str) -> Fraction | None:
    """0.1\\overline{6}, 0.(3), 0.\\dot{3} and 0.333\\ldots, where the dots follow what is seen to repeat."""
    if match := _REPEATING.fullmatch(text):
        whole, start, *periods = match.groups()
        period = re.sub(r"\D", "", next(part for part in periods if part is not None))
    elif match := _ELLIPSIS.fullmatch(text):
        whole, digits = match.groups()
        seen = re.fullmatch(r"(\d{0,12}?)(\d)\2{2,}|(\d{0,12}?)(\d{2,9}?)\4+", digits)
        if seen is None:
            return None
        start, period = seen.group(1) or seen.group(3) or "", seen.group(2) or seen.group(4)
    else:
        return None
    before = Fraction(int(whole + start or "0"), 10 ** len(start))
    return before + Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(start))


@dataclass(frozen=True)
class Unit:
    """`dimension`: what kind of thing it measures, "" for words that are not in the table; `factor`: in its first unit.

    `names`: the words themselves, without grammar.
    """

    dimension: str
    factor: Fraction
    names: frozenset[str]


@dataclass(frozen=True)
class Quantity:
    """`value`: what stands before and after the unit. `scale`: what to multiply it with, a thousand or a million."""

    value: str
    scale: Fraction
    unit: Unit | None


def _table() -> Iterator[tuple[str, str, Fraction]]:
    units = {
        "length": "mm millimeter millimetre=1/1000 cm centimeter centimetre=1/100 m meter metre=1 km kilometer=1000",
        "long": "in inch inches=1 ft foot feet=12 yd yard=36 mi mile=63360",
        "mass": "mg milligram=1/1000 g gram=1 kg kilogram=1000",
        "weight": "oz ounce=1 lb pound=16",
        "time": "s sec second=1 min minute=60 h hr hour=3600 day=86400 week=604800",
        "years": "month=1 year yr=12 decade=120 century centuries=1200",
        "money": "cent penny pennies ¢=1 dollar usd \\$=100",
        "volume": "ml milliliter millilitre=1 l liter litre=1000",
        "euros": "€ euro eur=1",
        "pounds": "£ gbp=1",
        "degrees": "^\\circ degree deg=1",
        "radians": "rad radian=1",
        "percent": "\\% % percent pct=1",
        "celsius": "celsius=1",
        "fahrenheit": "fahrenheit=1",
        "morning": "a.m. am=1",
        "evening": "p.m. pm=1",
    }
    for dimension, entries in units.items():
        names: list[str] = []
        for entry in entries.split():
            name, _, factor = entry.partition("=")
            names.append(name)
            if factor:
                yield from ((name, dimension, Fraction(factor)) for name in names)
                names = []


_UNITS = {name: (dimension, factor) for name, dimension, factor in _table()}
_SCALES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_POWERS = {"square": 2, "sq": 2, "squared": 2, "cubic": 3, "cubed": 3}
# What these add says nothing.
_FILLING = {"/", "unit", "of", "per", "in", "total", "the", "a", "each", "exactly"}
# With these a text says more than what is counted.
_SAYING = {
    *("is", "isn't", "isnt", "are", "was", "be", "not", "no", "none", "or", "and", "if", "but", "than", "less"),
    *("more", "fewer", "least", "most", "greater", "to", "from", "minus", "plus", "times", "divided", "wrong"),
    *("incorrect", "false", "except", "without", "only", "neither", "nor", "either", "maybe", "perhaps", "about"),
    *("approximately", "half", "twice", "remainder", "base", "mod", "modulo", "with", "when", "where", "for", "i"),
    *("think"),
}
_MOST_WORDS = 5
_ORDINAL = re.compile(r"(.*\d)\s*\^?\s*\{?\s*\\text\{\s*(?:st|nd|rd|th)\s*\}\s*\}?", re.DOTALL)
_POWER = r"\s*(?:\^\s*\{?\s*([23])\s*\}?)?\s*"
_SYMBOL_END = re.compile(r"(\\%|%|\^\\circ|€|£|¢|\\\$)\s*")
_TEXT_END = re.compile(r"\\text\{([^{}]*)\}" + _POWER)
_WORD_END = re.compile(r"((?:(?<=[\d)} ])[A-Za-z.]{2,}\s*){1,4}|(?<=\\circ )[CF])" + _POWER)
_ANGLE_FUNCTION = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-z])")
_START = re.compile(r"([+-]?)\s*(\\\$|€|£)\s*(.*)", re.DOTALL)
_WORD = re.compile(r"[a-z]+(?:[.'-][a-z]+)*\.?|\\?\S")


def quantity(text: str) -> Quantity:
    """A value and what it counts."""
    if match := _ORDINAL.fullmatch(text):
        return Quantity(match.group(1), Fraction(1), None)
    factor, units = Fraction(1), []
    if _ANGLE_FUNCTION.search(text):  # the degrees are its argument's
        return Quantity(text, factor, None)
    if match := _START.fullmatch(text):
        units.append(Unit(*_UNITS[match.group(2)], frozenset()))
        text = match.group(1) + match.group(3)
    while (found := _last_phrase(text)) is not None:
        text, scale, unit = found
        factor *= scale
        units += [unit] if unit.dimension or unit.names else []
    return Quantity(text, factor, _together(units))


def _last_phrase(text: str) -> tuple[str, Fraction, Unit] | None:
    """What is before the unit that ends the text, its scale and the unit; None where no unit ends it."""
    for pattern, only_known in ((_SYMBOL_END, True), (_TEXT_END, False), (_WORD_END, True)):
        starts = [match for match in pattern.finditer(text) if match.end() == len(text)]
        if starts and text[: starts[0].start()].strip():
            if pattern is _SYMBOL_END:
                return text[: starts[0].start()].rstrip(), Fraction(1), _unit([starts[0].group(1)], 1)
            powers = [int(power) for power in starts[0].groups()[1:] if power]
            read = _phrase(starts[0].group(1), powers, only_known)
            return None if read is None else (text[: starts[0].start()].rstrip(), *read)
    return None


def _phrase(text: str, powers: list[int], only_known: bool) -> tuple[Fraction, Unit] | None:
    """The scale and the unit that some words name; None where they say something else."""
    names = [_singular(word.strip(",()")) for word in _WORD.findall(text.lower())]
    known = [name in _UNITS or name in _SCALES or name in _POWERS or name in ("unit", "c", "f") for name in names]
    if len(names) > _MOST_WORDS or _SAYING.intersection(names) or (only_known and not all(known)):
        return None
    if not all(
        is_known or name in ("", "/") or name.strip(".").replace("'", "").replace("-", "").isalpha()
        for name, is_known in zip(names, known, strict=True)
    ):
        return None
    scale = Fraction(1)
    for name in names:
        scale *= _SCALES.get(name, 1)
        powers = [*powers, *([_POWERS[name]] if name in _POWERS else [])]
    rest = [name for name in names if name and name not in (*_SCALES, *_POWERS)]
    rest = [name for name in rest if name not in _FILLING or (name in _UNITS and len(rest) == 1)]  # inches
    return scale, _unit(rest, powers[0] if powers else 1)


def _singular(word: str) -> str:
    return word[:-1] if word.endswith("s") and word not in _UNITS and len(word) > 2 else word


def _unit(names: list[str], power: int) -> Unit:
    measures = [_UNITS[name] for name in names if name in _UNITS]
    if not measures:
        return Unit("", Fraction(1), frozenset(names))
    if len(measures) > 1:  # a speed or a price: only the same words are the same
        return Unit(" ".join(sorted(names)), Fraction(1), frozenset(names))
    dimension, factor = measures[0]
    return Unit(dimension if power == 1 else f"{dimension}^{power}", factor**power, frozenset(names))


def _together(units: list[Unit]) -> Unit | None:
    """One unit of several parts, such as degrees and Celsius."""
    letters = {name for unit in units for name in unit.names} & {"c", "f", "celsius", "fahrenheit"}
    if letters:
        return Unit("celsius" if letters & {"c", "celsius"} else "fahrenheit", Fraction(1), frozenset())
    return next((unit for unit in units if unit.dimension), units[0] if units else None)
