"""The bundled model's data: templated word problems with worked traces, and stories in the same vocabulary.

A problem starts from a quantity and changes it with `num_steps` = 2..6 equations; every value lies in 1..199. The
response is a `<think>` block with one line per equation, each naming the sentence it reads, and after it the answer in
`\\boxed{}`. Random fillers and occasional check lines give the traces entropy that distillation and GRPO can shape.

Splits are disjoint by law, not by luck: a problem belongs to the split that the hash of its canonical content (the
start value and the chain of operations with their numbers, without names, nouns and wording) selects, so that a
paraphrase never crosses over. Validation, added when models had been trained on the other three, owns a part of
calibration's range that is so placed that no recipe's calibration draw had a problem in it.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "calibration", "validation", "test"]

MAX_VALUE = 199
TIERS: dict[str, tuple[int, ...]] = {"2-3": (2, 3), "4": (4,), "5-6": (5, 6)}
# Percent of the hash range per split: [low, high).
SPLIT_RANGES: dict[Split, tuple[int, int]] = {"train": (0, 90), "calibration": (90, 95), "test": (95, 100)}
SPLITS: tuple[Split, ...] = (*SPLIT_RANGES, "validation")
# Of calibration's range, by the hash's next digits in base 954: [low, high), about one in 80. The widest gap, for a
# base below 1000, between the problems and stories that the recipes draw for calibration, which so stay as they were.
VALIDATION_BASE, VALIDATION_RANGE = 954, (783, 795)

_PEOPLE = (
    *((name, "she") for name in ("Mia", "Anna", "Zoe", "Lena", "Ruth", "Ivy", "Nora", "Emma")),
    *((name, "he") for name in ("Ben", "Tom", "Leo", "Max", "Paul", "Sam", "Omar", "Finn")),
)
_ITEMS = (
    *("apples", "coins", "cards", "books", "pens", "shells"),
    *("stamps", "beads", "eggs", "plums", "stones", "nuts"),
)
_THINGS = ("house", "tree", "bird", "river", "door", "garden", "boat", "lamp", "table", "hat")
_COLOURS = ("red", "green", "blue", "old", "small", "quiet", "warm", "bright")
_PLACES = ("park", "market", "school", "beach", "forest", "village", "library", "station")
_GAINS = ("buys", "finds", "gets", "picks", "wins", "collects", "borrows", "earns")
_LOSSES = ("loses", "sells", "drops", "donates", "trades", "breaks", "returns", "hides")
_TIMES = {2: "doubles", 3: "triples", 4: "quadruples"}
_OPENERS = ("", "", "Then ", "Later ", "After lunch ", "That day ")
_FILLERS = ("So", "Then", "Now", "Next", "Ok", "-")
_FILLER_WEIGHTS = (30, 25, 15, 12, 10, 8)
_CHECK_PROBABILITY = 0.15
_NUM_DISTRACTORS = (0, 0, 0, 1, 1, 2)


@dataclass(frozen=True)
class Step:
    """One sentence of a problem: kind, numbers, and the equations it needs as (left, operator, right, result)."""

    kind: str
    numbers: tuple[int, ...]
    equations: tuple[tuple[int, str, int, int], ...]


def split_of(canonical: str) -> Split:
    """The split that owns a canonical content: sha256 modulo 100, looked up in SPLIT_RANGES, validation taken out."""
    rest, bucket = divmod(int.from_bytes(hashlib.sha256(canonical.encode()).digest(), "big"), 100)
    split = next(split for split, (low, high) in SPLIT_RANGES.items() if low <= bucket < high)
    is_validation = split == "calibration" and VALIDATION_RANGE[0] <= rest % VALIDATION_BASE < VALIDATION_RANGE[1]
    return "validation" if is_validation else split


def canonical_content(start: int, steps: Sequence[Step]) -> str:
    """What identifies a problem whatever its wording, e.g. "12;gain 7;split 3"."""
    return ";".join([str(start), *(f"{step.kind} {' '.join(map(str, step.numbers))}".strip() for step in steps)])


def bundled_problems(split: Split, count: int, seed: int, tiers: Sequence[str] | None = None) -> list[dict[str, str]]:
    """`count` distinct problems of a split, uniform over the step counts of `tiers` (all of them by default).

    Rows have id, prompt, response, answer, tier. A smaller count gives a prefix of a larger one.
    """
    _check(split, count)
    num_steps_choices = _step_counts(tiers)
    rng = random.Random(f"problems/{split}/{seed}/{num_steps_choices}")
    rows: list[dict[str, str]] = []
    seen: set[str] = set()
    while len(rows) < count:
        num_steps = rng.choice(num_steps_choices)
        start, steps = _draw_chain(rng, num_steps)
        canonical = canonical_content(start, steps)
        if split_of(canonical) != split or canonical in seen:
            continue
        seen.add(canonical)
        rows.append(_row(rng, start, steps, num_steps))
    return rows


def bundled_stories(split: Split, count: int, seed: int) -> list[dict[str, str]]:
    """`count` texts in the problems' vocabulary without arithmetic (the mismatched domain); the prompt is empty."""
    _check(split, count)
    rng = random.Random(f"stories/{split}/{seed}")
    rows: list[dict[str, str]] = []
    while len(rows) < count:
        text = _story(rng)
        if split_of(text) == split:
            rows.append({"id": _identifier(text), "prompt": "", "response": text, "answer": "", "tier": ""})
    return rows


def bundled_drills(count: int, seed: int) -> list[str]:
    """`count` single equations "a op b = c" over exactly the number ranges that traces use (training only)."""
    rng = random.Random(f"drills/{seed}")
    drills = []
    for _ in range(count):
        left, operator, right, result = _draw_equation(rng)
        drills.append(f"{left} {operator} {right} = {result}")
    return drills


def _check(split: str, count: int) -> None:
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: use one of {', '.join(SPLITS)}")
    if count < 0:
        raise ValueError(f"count must not be negative, got {count}")


def _step_counts(tiers: Sequence[str] | None) -> tuple[int, ...]:
    unknown = [tier for tier in tiers or () if tier not in TIERS]
    if unknown or (tiers is not None and not tiers):
        raise ValueError(f"unknown tiers {unknown}: name at least one of {', '.join(TIERS)}")
    return tuple(num_steps for tier, counts in TIERS.items() if tiers is None or tier in tiers for num_steps in counts)


def _draw_chain(rng: random.Random, num_steps: int) -> tuple[int, list[Step]]:
    """A start value and sentences whose equations number exactly `num_steps`."""
    start = value = rng.randint(3, 120)
    steps: list[Step] = []
    remaining = num_steps
    used: set[str] = set()
    while remaining:
        step = _draw_step(rng, start, value, remaining, used)
        steps.append(step)
        if step.kind not in ("gain", "lose"):
            # A special sentence occurs once, so that a trace line names its sentence unambiguously.
            used.add(step.kind)
        remaining -= len(step.equations)
        value = step.equations[-1][3]
    return start, steps


def _draw_step(rng: random.Random, start: int, value: int, remaining: int, used: set[str]) -> Step:
    """One sentence that keeps the value in 1..MAX_VALUE; kinds that do not fit are drawn again."""
    while True:
        kind = rng.choice(("gain", "gain", "lose", "lose", "times", "split", "echo", "boxes", "bags"))
        if kind in used or (kind in ("boxes", "bags") and remaining < 2):
            continue
        step = _fit_step(rng, kind, start, value)
        if step is not None:
            return step


def _fit_step(rng: random.Random, kind: str, start: int, value: int) -> Step | None:
    if kind == "gain" and value < MAX_VALUE:
        n = rng.randint(1, MAX_VALUE - value)
        return Step(kind, (n,), ((value, "+", n, value + n),))
    if kind == "lose" and value > 1:
        n = rng.randint(1, value - 1)
        return Step(kind, (n,), ((value, "-", n, value - n),))
    if kind == "echo" and value + start <= MAX_VALUE:
        return Step(kind, (), ((value, "+", start, value + start),))
    factor = rng.randint(2, 4)
    if kind == "times" and value * factor <= MAX_VALUE:
        return Step(kind, (factor,), ((value, "*", factor, value * factor),))
    parts = rng.randint(2, 9)
    if kind == "split" and value % parts == 0:
        return Step(kind, (parts,), ((value, "/", parts, value // parts),))
    num_groups, size = rng.randint(2, 9), rng.randint(2, 9)
    product = num_groups * size
    multiply = (num_groups, "*", size, product)
    if kind == "boxes" and value + product <= MAX_VALUE:
        return Step(kind, (num_groups, size), (multiply, (value, "+", product, value + product)))
    if kind == "bags" and product < value:
        return Step(kind, (num_groups, size), (multiply, (value, "-", product, value - product)))
    return None


def _row(rng: random.Random, start: int, steps: Sequence[Step], num_steps: int) -> dict[str, str]:
    name, pronoun = rng.choice(_PEOPLE)
    item = rng.choice(_ITEMS)
    gains, losses = iter(rng.sample(_GAINS, len(_GAINS))), iter(rng.sample(_LOSSES, len(_LOSSES)))
    sentences, lines = [f"{name} has {start} {item}."], [f"start {start}"]
    for step in steps:
        verb = next(gains) if step.kind == "gain" else next(losses) if step.kind == "lose" else ""
        body, note = _wording(step, verb, item, start)
        opener = rng.choice(_OPENERS)
        sentences.append(f"{opener}{pronoun} {body}." if opener else f"{pronoun.capitalize()} {body}.")
        lines.extend(_trace_lines(rng, note, step))
    for _ in range(rng.choice(_NUM_DISTRACTORS)):
        sentences.insert(rng.randint(1, len(sentences)), _distractor(rng, name))
    prompt = " ".join([*sentences, f"How many {item} does {name} have now?"])
    answer = str(steps[-1].equations[-1][3])
    trace = "\n".join(lines)
    tier = next(tier for tier, counts in TIERS.items() if num_steps in counts)
    response = f"<think>\n{trace}\n</think>\n\\boxed{{{answer}}}"
    return {"id": _identifier(prompt), "prompt": prompt, "response": response, "answer": answer, "tier": tier}


def _wording(step: Step, verb: str, item: str, start: int) -> tuple[str, str]:
    """The sentence's body and the note that quotes it in the trace."""
    match step.kind, step.numbers:
        case "gain", (n,):
            return f"{verb} {n} more {item}", f"{verb} {n}"
        case "lose", (n,):
            return f"{verb} {n} {item}", f"{verb} {n}"
        case "times", (factor,):
            return f"{_TIMES[factor]} the pile", _TIMES[factor]
        case "split", (parts,):
            return f"splits the pile into {parts} parts and keeps one", f"splits {parts}"
        case "echo", ():
            return "adds as many as at the start", f"adds start {start}"
        case "boxes", (num_groups, size):
            return f"opens {num_groups} boxes of {size} {item}", f"opens {num_groups} of {size}"
        case "bags", (num_groups, size):
            return f"ships {num_groups} bags of {size} {item}", f"ships {num_groups} of {size}"
    raise AssertionError(f"no wording for {step}")


def _trace_lines(rng: random.Random, note: str, step: Step) -> list[str]:
    lines = []
    for index, (left, operator, right, result) in enumerate(step.equations):
        filler = rng.choices(_FILLERS, _FILLER_WEIGHTS)[0]
        lines.append(f"{filler} {note if index == 0 else 'total'}: {left} {operator} {right} = {result}")
        if rng.random() < _CHECK_PROBABILITY:
            inverse = {"+": "-", "-": "+", "*": "/", "/": "*"}[operator]
            lines.append(f"Check: {result} {inverse} {right} = {left}")
    return lines


def _distractor(rng: random.Random, name: str) -> str:
    if rng.random() < 0.5:
        return f"The {rng.choice(_THINGS)} is {rng.choice(_COLOURS)}."
    friend = rng.choice([other for other, _ in _PEOPLE if other != name])
    return f"{friend} has {rng.randint(2, MAX_VALUE)} {rng.choice(_ITEMS)}."


def _story(rng: random.Random) -> str:
    (name, pronoun), (friend, _) = rng.sample(_PEOPLE, 2)
    sentences = [f"{name} has a {rng.choice(_COLOURS)} {rng.choice(_THINGS)} at the {rng.choice(_PLACES)}."]
    for _ in range(rng.randint(4, 8)):
        verb, item = rng.choice(_GAINS + _LOSSES), rng.choice(_ITEMS)
        thing, place = rng.choice(_THINGS), rng.choice(_PLACES)
        colour = rng.choice(_COLOURS)
        opener = rng.choice(_OPENERS)
        subject = f"{opener}{pronoun}" if opener else pronoun.capitalize()
        sentences.append(
            rng.choice(
                (
                    f"{subject} {verb} the {colour} {item} at the {place}.",
                    f"{friend} opens the door and keeps the {colour} {thing}.",
                    f"The {thing} is {colour} and the {place} is {rng.choice(_COLOURS)}.",
                    f"{subject} and {friend} have the {item} now.",
                    f"So many {item} at the {place}, and the {thing} is {colour}.",
                )
            )
        )
    return " ".join(sentences)


def _draw_equation(rng: random.Random) -> tuple[int, str, int, int]:
    kind = rng.choice("++--*/")
    if kind == "+":
        total, part = sorted(rng.sample(range(1, MAX_VALUE + 1), 2), reverse=True)
        return total - part, "+", part, total
    if kind == "-":
        whole, part = sorted(rng.sample(range(1, MAX_VALUE + 1), 2), reverse=True)
        return whole, "-", part, whole - part
    factor = rng.randint(2, 9)
    other = rng.randint(1, MAX_VALUE // factor)
    return (other, "*", factor, other * factor) if kind == "*" else (other * factor, "/", factor, other)


def _identifier(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
