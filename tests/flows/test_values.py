"""What people type after --set: taken as they mean it, or told in one short line."""

from __future__ import annotations

import random
import string
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flows.config import LONGEST_MESSAGE, ConfigError, RunConfig, apply_overrides
from flows.recipes import demo, tiny_w2g128
from flows.values import parse_value
from tasks.runtime.stage import StageConfig

RUN = tiny_w2g128()
AWKWARD = [
    "", " ", "#", " #x", "a #b", "@x", "%x", "`x", "*a", "&a", "&a [*a, *a]", "[", "]", "{", "}", "[1", "{a: ",
    "a: b: c", "!!python/object:os.system x", "!!binary x", "!!set {a}", "!x", "? a", "- a", "|", ">", "\t", "\x00",
    "\x1b[2J", "\ud800", "'", '"', "'a", '"\\x"', "nan", ".nan", "inf", "-.inf", "1e999", "-1e999", "9" * 5000,
    "0" * 12_000, "1_000", "0x10", "0o17", "010", "1:30", "2024-13-45", "2024-01-01", "no", "yes", "on", "off", "No",
    "~", "null", "NULL", "true", "True", "[" * 900 + "]" * 900, "[" * 5000, "{a: " * 900 + "}" * 900, "[nan]",
    "[1, [2, [3]]]", "{steps: nan}", "...", "---", "<<: {}", "{<<: 1}", "💥", "a\nb", "1\n2", "=", "a=b", "x" * 9000,
]  # fmt: skip
"""Values that a YAML reader or a type conversion trips over."""


def paths(config: StageConfig | None = None, prefix: str = "") -> list[str]:
    """Every path below a branch of the demo that --set can name."""
    config = config or demo().branches["W2G128 GPTQ+KD+GRPO"]
    found = []
    for name in type(config).model_fields:
        value = getattr(config, name)
        found += [f"{prefix}{name}", *(paths(value, f"{prefix}{name}.") if isinstance(value, StageConfig) else [])]
    return found


def told(overrides: list[str]) -> RunConfig | str:
    """The run, or the one message; any other exception is a fault."""
    try:
        return apply_overrides(RUN, overrides)
    except ConfigError as error:
        assert 0 < len(str(error)) <= LONGEST_MESSAGE and "\n" not in str(error)
        return str(error)


@pytest.mark.parametrize("path", paths())
def test_no_value_of_any_setting_ends_in_another_error(path: str) -> None:
    for value in random.Random(path).sample(AWKWARD, 12):
        told([f"{path}={value}"])


@pytest.mark.parametrize("path", ["kd_train.steps", "evaluate.seeds", "train_data.source", "ptq_init", "benchmarks"])
def test_no_awkward_value_of_any_kind_of_setting_ends_in_another_error(path: str) -> None:
    for value in AWKWARD:
        told([f"{path}={value}"])


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_no_random_value_ends_in_another_error(data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(paths()))
    value = data.draw(
        st.text(max_size=40) | st.sampled_from(AWKWARD) | st.text("[]{},:#&*!|>'\"%@`-?~ \t\n01ae.", max_size=30)
    )
    told([f"{path}={value}"])


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=60))
def test_no_random_override_ends_in_another_error(text: str) -> None:
    told([text])


@pytest.mark.parametrize(
    "text",
    ["no", "yes", "null ", "7", "007", "1e-5", "@x", "a #b", "/data/run #2", "2024-01-01", "1:30", "[a]", "{a: b}"],
)
def test_text_is_taken_as_it_is_typed(text: str) -> None:
    assert parse_value(text, str) == text
    assert parse_value(text, str | None) == text


def test_text_can_be_quoted_and_none_named() -> None:
    assert parse_value("'null'", str | None) == "null"
    assert parse_value("null", str | None) is None
    assert parse_value("null", str) == "null"
    assert parse_value("no", Literal["no", "bf16"]) == "no"
    assert parse_value("null", Literal["a"] | None) is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3), ("1e-5", 1e-5), ("1E5", 1e5), ("true", True), ("null", None), ("[42, 43]", [42, 43]), ("010", 10),
        ("-2", -2), ("1_000", 1000), ("{steps: 3}", {"steps": 3}), ("1:30", "1:30"), ("no", "no"), (".5", 0.5),
        ("2024-01-01", "2024-01-01"), ("['a #b', \"c #\"]", ["a #b", "c #"]),
    ],
)  # fmt: skip
def test_other_values_are_yaml_1_2(text: str, value: Any) -> None:
    assert parse_value(text, int | float | bool | None) == value and type(parse_value(text, int)) is type(value)


@pytest.mark.parametrize("text", ["3 #4", "[a #b]", "# 3", "[1] # a list"])
def test_nothing_is_cut_off_as_a_comment(text: str) -> None:
    with pytest.raises(ValueError, match="comment"):
        parse_value(text, tuple[str, ...])


def test_a_setting_keeps_what_was_typed() -> None:
    run = told(
        ["model=/data/run #2", "kd_train.mixed_precision=no", "grpo_train.generation.prompt_suffix= think: no #hurry"]
    )
    assert isinstance(run, RunConfig)
    branch = run.branches["Reasoning-QAT W2G128"]
    assert branch.base_model is not None and branch.base_model.model == "/data/run #2"
    assert branch.kd_train is not None and branch.kd_train.mixed_precision == "no"


def test_a_branch_may_hold_what_parts_an_override() -> None:
    run = tiny_w2g128()
    renamed = run.with_branches({"a=b: c": run.branches["Reasoning-QAT W2G128"]})
    kd = apply_overrides(renamed, ["a=b: c:kd_train.steps=11"]).branches["a=b: c"].kd_train
    assert kd is not None and kd.steps == 11


def test_a_whole_section_can_be_given() -> None:
    run = told(["kd_train={steps: 20, warmup_steps: 2}"])
    assert isinstance(run, RunConfig)
    kd = run.branches["Reasoning-QAT W2G128"].kd_train
    assert kd is not None and (kd.steps, kd.learning_rate) == (20, 1e-6), "what is not named is the default again"


def test_long_names_are_shortened_in_the_message() -> None:
    name = "".join(random.Random(0).choices(string.ascii_letters, k=5000))
    for override in (f"{name}=1", f"kd_train.{name}=1", f"{name}:kd_train.steps=1", f"kd_train.steps={name}", name):
        assert isinstance(told([override]), str)
