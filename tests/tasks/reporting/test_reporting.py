"""Reports say what the data say, the same bytes each time, and model output in them stays text."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pandas as pd
import pytest
from rich.console import Console

from tasks.reporting import figures, tables
from tasks.reporting.comparisons import comparison_table, comparison_text
from tasks.reporting.data import Comparison, LadderRow, ReportData, SampleRow, StageRow, TrainingCurve
from tasks.reporting.html import build_report
from tasks.reporting.page import LONGEST_TEXT

HOSTILE = "</pre><script>alert(1)</script><img src=x onerror=go()>{{ 7*7 }} $\\frac{ [red]x[/red] | `b` & 'p'"


def evaluation(accuracy: float, task: str = "bundled", **tiers: float) -> dict[str, Any]:
    return {
        "task": task,
        "num_problems": 1000,
        "seeds": [42, 43, 44],
        "accuracy": accuracy,
        "std": 0.01,
        "ci95": [accuracy - 0.02, accuracy + 0.03],
        "per_seed": [accuracy] * 3,
        "tiers": {name: {"accuracy": value, "ci95": [value, value], "num": 10} for name, value in tiers.items()},
        "paper": {"accuracy": accuracy + 0.05},
        "truncation_rate": 0.0125,
        "repetition_rate": 0.25,
        "mean_length": 123.456,
        "entropy": 0.3456,
    }


def rows() -> list[LadderRow]:
    worse = {"diff": -0.5, "ci95": [-0.53, -0.47], "p_value": 1e-4, "num_problems": 1000}
    noise = {"diff": 0.004, "ci95": [-0.01, 0.02], "p_value": 0.6, "num_problems": 1000}
    return [
        LadderRow("BF16", "bf16", evaluation(0.9, **{"2": 0.99, "10": 0.5}), "a" * 64, "reasoning-qat run demo"),
        LadderRow("RTN", "W2G128", evaluation(0.4, **{"2": 0.4}), "b" * 64, "reasoning-qat run rtn", worse),
        LadderRow("KD", "W2G128", evaluation(0.904, **{"2": 0.99, "10": 0.51}), "c" * 64, "", noise),
    ]


def curve(stage: str = "kd_train", num_steps: int = 120, **fields: float | None) -> TrainingCurve:
    log = [{"step": step, "loss": 2 / step, **fields} for step in range(1, num_steps + 1)]
    return TrainingCurve(f"{stage} of $W2", stage, log)


def report() -> ReportData:
    config = {"scheme": {"bits": 2}, "betas": [0.9, 0.95], "note": None}
    checkpoint = f"checkpoint:{'a' * 64}"
    stages = [
        StageRow("pretrain", "1" * 64, "checkpoint", ["BF16", "RTN"], config, {}),
        StageRow("kd_train", "2" * 64, "checkpoint", ["RTN"], config, {"student": checkpoint}),
    ]
    sample = SampleRow("RTN", HOSTILE, HOSTILE, HOSTILE, "42", None, False, "length", 99)
    curves = [
        curve(),
        curve("grpo_train", reward_mean=0.5, response_length=80.0, entropy=None, mismatch_abs=0.01),
    ]
    return ReportData(
        title="Run",
        description=HOSTILE,
        rows=rows(),
        reference="BF16",
        comparisons=[
            Comparison("KD", "RTN", "bundled", 0.1, (0.05, 0.15), 0.001, 500),
            Comparison("KD", "BF16", "bundled", 0.0, (-0.1, 0.1), 1.0, 500),
        ],
        curves=curves,
        stages=stages,
        samples=[sample],
    )


def test_comparisons_say_what_differs() -> None:
    table = comparison_table(report().comparisons)
    assert table[["difference", "low", "high"]].iloc[0].tolist() == pytest.approx([10.0, 5.0, 15.0])
    text = comparison_text(table)
    assert text["verdict"].tolist() == ["differs", "within noise"]
    assert text["points [95%]"].tolist() == ["+10.0 [+5.0, +15.0]", "+0.0 [-10.0, +10.0] ~"]
    assert "benchmark" not in text
    several = [report().comparisons[0], replace(report().comparisons[0], benchmark="gsm8k")]
    assert comparison_text(comparison_table(several))["benchmark"].tolist() == ["bundled", "gsm8k"]
    assert list(comparison_table([]).columns) == list(table.columns)


def test_ladder_holds_numbers() -> None:
    table = tables.ladder_table(rows())
    assert list(table["branch"]) == ["BF16", "RTN", "KD"]
    assert table.loc[0, ["accuracy", "low", "high"]].tolist() == pytest.approx([90.0, 88.0, 93.0])
    assert [name for name in table.columns if name.startswith("tier")] == ["tier 2", "tier 10"]
    assert math.isnan(table.loc[1, "tier 10"])
    assert math.isnan(table.loc[0, "difference"])
    assert table.loc[1, ["difference", "difference_low", "difference_high"]].tolist() == pytest.approx([-50, -53, -47])
    assert table.loc[2, ["truncation", "mean_length", "problems", "seeds"]].tolist() == [
        1.25,
        123.456,
        1000,
        3,
    ]
    assert table.loc[2, ["accuracy_paper", "repetition", "entropy"]].tolist() == pytest.approx([95.4, 25.0, 0.3456])


def test_ladder_table_survives_parquet() -> None:
    buffer = io.BytesIO()
    tables.ladder_table(rows()).to_parquet(buffer)
    pd.testing.assert_frame_equal(pd.read_parquet(buffer), tables.ladder_table(rows()))


def test_ladder_text() -> None:
    text = tables.ladder_text(tables.ladder_table(rows()), "BF16")
    assert text.iloc[1].to_dict() == {
        "branch": "RTN",
        "scheme": "W2G128",
        "accuracy % [95%]": "40.0 [38.0, 43.0]",
        "tier 2": "40.0",
        "tier 10": tables.ABSENT,
        "points vs BF16": "-50.0 [-53.0, -47.0]",
        "paper scorer %": "45.0",
        "truncated %": "1.2",
        "repeating %": "25.0",
        "mean length": "123.5",
        "entropy": "0.346",
        "problems x seeds": "1000 x 3",
        "checkpoint": "b" * 12,
    }
    assert text.loc[2, "points vs BF16"] == "+0.4 [-1.0, +2.0] ~", "within noise"
    alone = tables.ladder_text(tables.ladder_table(rows()[:1]))
    assert not [name for name in alone.columns if "points" in name]


def several_benchmarks() -> list[LadderRow]:
    """The three branches on `bundled`, and two of them on `other`, which has other tiers."""
    other = [replace(row, evaluation=evaluation(0.5, "other", hard=0.5)) for row in rows()[:2]]
    return [*rows(), *other]


def test_several_benchmarks_stand_side_by_side_and_one_by_one() -> None:
    table = tables.ladder_table(several_benchmarks())
    overview = tables.overview_text(table)
    assert list(overview.columns) == ["branch", "scheme", "bundled % [95%]", "other % [95%]", "mean %"]
    assert overview.iloc[0].tolist() == ["BF16", "bf16", "90.0 [88.0, 93.0]", "50.0 [48.0, 53.0]", "70.0"]
    assert overview.iloc[2].tolist() == ["KD", "W2G128", "90.4 [88.4, 93.4] ~", tables.ABSENT, tables.ABSENT]
    parts = tables.by_benchmark(table)
    assert list(parts) == ["bundled", "other"]
    assert [c for c in parts["other"].columns if c.startswith("tier")] == ["tier hard"]
    page = Page(build_report(replace(report(), rows=several_benchmarks())))
    assert page.open == [] and page.elements.count("svg") == 4
    assert "90.4 [88.4, 93.4] ~" in page.text and "hard" in page.text
    assert page.text.count("reasoning-qat run rtn") == 1, "a branch is run again as one"


def test_a_narrow_terminal_cuts_no_word() -> None:
    table = pd.DataFrame({"branch": ["Reasoning-QAT"], **{f"tier {i}": ["100.0 [83.9, 100.0]"] for i in range(5)}})
    table[tables.CHECKPOINT] = "21b6979abd1d"
    console = Console(file=io.StringIO(), width=72, color_system=None)
    console.print(tables.rich_table(table))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "21b6979abd1d" in shown and "\N{HORIZONTAL ELLIPSIS}" not in shown


def test_noise_is_pale_and_marked() -> None:
    page = Page(build_report(report()))
    noise = [value for name, value in page.attributes if name == "class" and value and "noise" in value]
    assert len(noise) == 2, "one difference of the ladder and one comparison"
    console = Console(file=io.StringIO(), width=100, force_terminal=True, color_system="standard")
    console.print(tables.rich_table(pd.DataFrame({"points": ["+0.4 [-1.0, +2.0] ~", "+4.0 [+1.0, +7.0]"]})))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b[2m+0.4 [-1.0, +2.0] ~\x1b[0m" in shown and "\x1b[2m+4.0" not in shown
    assert tables.is_numeric(["+0.4 [-1.0, +2.0] ~", "-1.0 [-2.0, -0.1]"])


def test_no_rows_and_missing_fields() -> None:
    assert tables.ladder_table([]).empty
    broken = replace(rows()[0], evaluation={"accuracy": 1.0})
    with pytest.raises(ValueError, match=r"'BF16' lacks task, ci95, tiers.*run its evaluate stage again"):
        tables.ladder_table([broken])


def test_natural_order() -> None:
    names = ["10", "2", "easy", "7-9", "7-10", "tier 11", "tier 3"]
    assert sorted(names, key=tables.natural_key) == ["2", "7-9", "7-10", "10", "easy", "tier 3", "tier 11"]


def test_markdown_keeps_its_cells_whatever_is_in_them() -> None:
    text = pd.DataFrame({"branch": ["a|b\n<b>*c*", "d"], "points": ["+1.0 [0.0, 2.0]", tables.ABSENT]})
    assert tables.markdown(text).splitlines() == [
        "| branch | points |",
        "| :--- | ---: |",
        "| a\\|b &lt;b&gt;\\*c\\* | +1.0 \\[0.0, 2.0\\] |",
        f"| d | {tables.ABSENT} |",
    ]


def test_rich_table_shows_markup_as_text() -> None:
    console = Console(file=io.StringIO(), width=100)
    console.print(tables.rich_table(pd.DataFrame({"[b]x": ["[red]y[/red]"]}), "[i]t"))
    assert isinstance(console.file, io.StringIO)
    assert all(part in console.file.getvalue() for part in ("[b]x", "[red]y[/red]", "[i]t"))


def test_ladder_figure_draws_the_intervals() -> None:
    axes = figures.ladder_figure(tables.ladder_table(rows())).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["BF16", "RTN", "KD"]
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([90.0, 40.0, 90.4])  # type: ignore[attr-defined]
    [intervals] = [c for c in axes.collections if len(c.get_paths()) == 3]
    assert [path.vertices[:, 0].tolist() for path in intervals.get_paths()] == [  # type: ignore[index, union-attr]
        pytest.approx([88.0, 93.0]),
        pytest.approx([38.0, 43.0]),
        pytest.approx([88.4, 93.4]),
    ]


def test_curves_skip_fields_that_no_log_has_and_gaps_in_those_that_do() -> None:
    log: list[dict[str, Any]] = [
        {"step": 1, "reward_mean": 0.0},
        {"step": 2, "reward_mean": None},
        {"step": 3, "reward_mean": 1.0},
    ]
    figure = figures.curves_figure([TrainingCurve("g", "grpo_train", log)], figures.GRPO_PANELS)
    [axes] = [axes for axes in figure.axes if axes.get_visible()]
    assert axes.get_title(loc="left") == "mean reward"
    assert axes.lines[0].get_xydata().tolist() == [[1.0, 0.0], [3.0, 1.0]]  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="no curve has any of the fields"):
        figures.curves_figure([TrainingCurve("g", "grpo_train", log)], figures.LOSS_PANELS)


def test_held_out_curves_begin_at_the_start_beside_the_loss() -> None:
    log: list[dict[str, Any]] = [{"step": 0, "validation_kl": 0.5}, {"step": 1, "loss": 2.0}]
    log.append({"step": 2, "loss": 1.0, "validation_kl": 0.25})
    figure = figures.curves_figure([TrainingCurve("k", "kd_train", log)], figures.LOSS_PANELS)
    drawn = {axes.get_title(loc="left"): axes.lines[0].get_xydata().tolist() for axes in figure.axes}  # type: ignore[union-attr]
    assert drawn == {
        "training loss": [[1.0, 2.0], [2.0, 1.0]],
        "held-out KL to the teacher, nats per token": [[0.0, 0.5], [2.0, 0.25]],
    }


def test_long_curves_are_smoothed_over_a_fiftieth_of_their_length() -> None:
    log: list[dict[str, Any]] = [{"step": step, "loss": float(step % 2)} for step in range(1, 201)]
    axes = figures.curves_figure([TrainingCurve("k", "kd_train", log)], figures.LOSS_PANELS).axes[0]
    raw, mean = axes.lines[0].get_ydata(), axes.lines[1].get_ydata()
    assert set(raw) == {0.0, 1.0}  # type: ignore[arg-type]
    assert set(mean[4:-4]) == {0.5}  # type: ignore[index, arg-type]


def test_images_are_reproducible_and_escaped() -> None:
    label = "<script>&$x$"
    one, other = (figures.ladder_figure(tables.ladder_table([replace(rows()[0], label=label)])) for _ in "ab")
    assert figures.svg(one) == figures.svg(other)
    assert figures.png(one) == figures.png(other)
    assert figures.svg(one).startswith("<svg")
    assert "&lt;script&gt;&amp;$x$" in figures.svg(one)
    assert "currentColor" in figures.svg(one)
    assert figures.png(one).startswith(b"\x89PNG")
    assert figures.data_uri(b"\x89PNG").startswith("data:image/png;base64,iVBORw")


class Page(HTMLParser):
    """Elements, attributes and text of a page, and whether its elements are closed in order."""

    VOID = ("meta", "br", "img", "input", "link", "path", "use", "rect")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.attributes.extend(attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.attributes.extend(attrs)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_report_shows_everything_and_hostile_text_as_text() -> None:
    page = Page(build_report(report()))
    assert page.open == []
    assert not {"script", "img", "iframe", "link", "object", "embed", "base", "form"} & set(page.elements)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert page.text.count(HOSTILE) == 4  # description, problem, prompt, completion
    for shown in (
        "40.0 [38.0, 43.0]",
        "-50.0 [-53.0, -47.0]",
        "reasoning-qat run rtn",
        "scheme.bits",
    ):
        assert shown in page.text
    assert page.elements.count("svg") == 3
    ids = {value for name, value in page.attributes if name == "id"}
    inner = {value[1:] for name, value in page.attributes if name == "href" and value and value.startswith("#")}
    assert {"stage-0", "stage-1", "ladder"} <= inner <= ids


def test_report_fetches_nothing() -> None:
    page = Page(build_report(report()))
    for name, value in page.attributes:
        if name in ("src", "href", "xlink:href", "action", "srcset", "data"):
            assert value is not None
            assert value.startswith(("#", "data:"))


def test_report_is_the_same_each_time() -> None:
    assert build_report(report()) == build_report(report())


def test_report_can_be_written_whatever_a_model_says() -> None:
    sample = replace(report().samples[0], text="a\0b\ud800c" + "x" * LONGEST_TEXT + "end")
    page = build_report(replace(report(), samples=[sample]))
    page.encode("utf-8")
    assert "\0" not in page
    assert "characters left out" in page
    assert "xend</pre>" in page


def test_report_of_nothing() -> None:
    page = Page(build_report(ReportData("Empty", "", [])))
    assert "No branch was evaluated." in page.text
    assert "svg" not in page.elements


def test_branches_of_unequal_problems_are_compared_on_what_they_share() -> None:
    from tasks.reporting.build import _paired

    def samples(ids: str, correct: bool) -> pd.DataFrame:
        return pd.DataFrame({"problem_id": list(ids), "seed": 1, "correct": correct})

    paired = _paired(samples("abcd", False), samples("bcde", True))
    assert paired is not None and (paired["diff"], paired["num_problems"]) == (1.0, 3)
    assert _paired(samples("ab", True), samples("cd", True)) is None
