"""Figures, drawn without a display: the accuracy ladder, and training curves (paper, Figures 2 and 4).

Functions return a matplotlib Figure; `svg` and `png` turn it into the same bytes for the same data.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tasks.reporting.data import TrainingCurve

INK = "#1f2933"  # text and axes; in an SVG it becomes the colour of the surrounding text, light or dark
COLORS = ("#2f6fde", "#d9822b", "#2e9e6b", "#c2413b", "#8a63d2", "#8c6d4f", "#d86fb1", "#7a8793")
STYLE: dict[Any, Any] = {
    "text.parse_math": False,  # labels are names, and a name may hold a dollar sign
    "svg.fonttype": "none",
    "svg.hashsalt": "reasoning-qat",  # else the identifiers in the file are random
    "font.size": 9,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
}
NUM_SMOOTHED = 50  # a curve of more steps is shown as its running mean over 1/50 of it, with the raw values pale


@dataclass(frozen=True)
class Panel:
    """One field of a training log, drawn over the steps."""

    field: str
    title: str


LOSS_PANELS = (
    Panel("loss", "training loss"),
    Panel("validation_cross_entropy", "held-out cross entropy, nats per token"),
    Panel("validation_kl", "held-out KL to the teacher, nats per token"),
    Panel("validation_prompt_kl", "the same on prompts"),
)
GRPO_PANELS = (
    Panel("reward_mean", "mean reward"),
    Panel("validation_accuracy", "held-out accuracy"),
    Panel("response_length", "response length, tokens"),
    Panel("entropy", "entropy, nats per token"),
    Panel("mismatch_abs", "|log p trainer - log p engine|"),
)


def ladder_figure(table: pd.DataFrame) -> Figure:
    """Accuracy with its 95% interval for each row of one benchmark's ladder table, first row on top."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 0.9 + 0.34 * len(table)), layout="constrained")
        axes = figure.subplots()
        places, accuracy = np.arange(len(table)), table["accuracy"].to_numpy()
        errors = np.clip([accuracy - table["low"], table["high"] - accuracy], 0, None)  # rounding may go below 0
        axes.barh(places, accuracy, color=COLORS[0], alpha=0.35, height=0.62)
        axes.errorbar(accuracy, places, xerr=errors, fmt="o", color=COLORS[0], markersize=4, capsize=3)
        axes.set_yticks(places, [str(label) for label in table["branch"]])
        axes.set_xlabel("accuracy, % (bars: 95% interval)")
        axes.set_xlim(0, 100)
        axes.grid(axis="y", visible=False)
        axes.invert_yaxis()
    return figure


def curves_figure(curves: Sequence[TrainingCurve], panels: Sequence[Panel]) -> Figure:
    """A panel for each field that some curve has, a line for each curve. ValueError if there is none."""
    shown = [panel for panel in panels if any(_points(curve, panel.field)[0].size for curve in curves)]
    if not shown:
        raise ValueError(f"no curve has any of the fields {[panel.field for panel in panels]}")
    num_columns = min(2, len(shown))
    num_rows = -(-len(shown) // num_columns)
    with matplotlib.rc_context(STYLE):
        height = 2.4 * num_rows + 0.2 * len(curves)
        figure = Figure(figsize=(3.6 * num_columns if num_columns > 1 else 5.4, height), layout="constrained")
        grid = figure.subplots(num_rows, num_columns, squeeze=False).ravel()
        for axes, panel in zip(grid, shown, strict=False):
            _draw_panel(axes, curves, panel)
        for axes in grid[len(shown) :]:
            axes.set_visible(False)
        handles = [grid[0].plot([], [], color=_color(i), label=curve.label)[0] for i, curve in enumerate(curves)]
        figure.legend(handles=handles, loc="outside lower left")
    return figure


def _draw_panel(axes: Axes, curves: Sequence[TrainingCurve], panel: Panel) -> None:
    for index, curve in enumerate(curves):
        steps, values = _points(curve, panel.field)
        window = max(1, len(values) // NUM_SMOOTHED)
        if window > 1:
            axes.plot(steps, values, color=_color(index), alpha=0.25, linewidth=0.7)
            values = pd.Series(values).rolling(window, center=True, min_periods=1).mean().to_numpy()
        axes.plot(steps, values, color=_color(index), linewidth=1.4, marker="." if len(values) == 1 else None)
    axes.set_title(panel.title, fontsize=9, loc="left")
    axes.set_xlabel("step")


def _color(index: int) -> str:
    return COLORS[index % len(COLORS)]


def _points(curve: TrainingCurve, field: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values [num_points] of the rows that have a value for `field`."""
    rows: list[Mapping[str, Any]] = [row for row in curve.rows if row.get(field) is not None]
    return np.array([row["step"] for row in rows], float), np.array([row[field] for row in rows], float)


def svg(figure: Figure) -> str:
    """An <svg> element to stand inside HTML: no prolog, no date, ink in the colour of the text around it."""
    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace(INK, "currentColor")


def png(figure: Figure, dpi: int = 144) -> bytes:
    """A PNG on white."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="png", dpi=dpi, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def data_uri(image: bytes) -> str:
    """A PNG as the address of an image, for pages that have no file host."""
    return "data:image/png;base64," + base64.b64encode(image).decode()
