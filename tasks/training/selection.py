"""Which state of a training run its stage gives: the best by a held-out measure, the start included, or the last.

The measure is taken before the first step, every `validate_every` steps and after the last one. The best state lies in
scratch, sealed as checkpoints are: 4 bytes a trained parameter for the best of now and for that of each checkpoint, so
that a run that goes on from either chooses as it would have. None is held in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from artifacts import scratch as midstage
from tasks.runtime.stage import Metrics, StageError
from tasks.training import checkpoints
from tasks.training.checkpoints import PARAMETERS, Row
from tasks.training.config import StudentConfig

PREFIX = "best-"
FIELD_PREFIX = "validation_"
"""Of the measure's figures in a log row."""


@dataclass(frozen=True)
class Measure:
    name: str
    """Of the figure that chooses."""
    higher_is_better: bool
    figures: Callable[[int], dict[str, float]]
    """After so many steps: figures by name, that of the measure among them, each a function of the weights alone."""

    @property
    def field(self) -> str:
        return FIELD_PREFIX + self.name

    def cost(self, row: Row) -> float:
        """Lower is better; a figure that is not finite is worse than any that is."""
        value = row[self.field]
        return math.inf if value is None else -value if self.higher_is_better else value


class LastState:
    """Nothing is held out: a run gives its last state."""

    def start(self, module: nn.Module) -> list[Row]:
        """The rows of a run that begins."""
        return []

    def watch(self, module: nn.Module, rows: list[Row]) -> None:
        """Called after each step, whose row is the last."""

    def is_over(self, rows: Sequence[Row]) -> bool:
        """Whether the run ends before its last step."""
        return False

    def survives(self, rows: Sequence[Row]) -> bool:
        """Whether there is a state to give although training diverged."""
        return False

    def can_continue(self, rows: Sequence[Row]) -> bool:
        """Whether a run can go on from a checkpoint with these rows."""
        return True

    def settle(self, module: nn.Module, rows: Sequence[Row]) -> None:
        """Put the chosen state into `module`."""

    def facts(self, rows: Sequence[Row]) -> Metrics:
        """What the record says of the choice."""
        return {}

    def shown(self, rows: Sequence[Row]) -> dict[str, float]:
        """What the progress line shows beside the loss."""
        return {}


LAST_STATE = LastState()


class Selection(LastState):
    """Takes the measure into the log rows and keeps the best state in `scratch`, as `config` says."""

    def __init__(self, measure: Measure, config: StudentConfig, scratch: Path) -> None:
        self.measure, self.config, self.scratch = measure, config, scratch
        self.keeps_best = config.keep != "last"

    def start(self, module: nn.Module) -> list[Row]:
        rows: list[Row] = [{"step": 0}]
        self.watch(module, rows)
        return rows

    def watch(self, module: nn.Module, rows: list[Row]) -> None:
        """Add the measure to the last row where it is due, and write the state if it is the best yet."""
        step = rows[-1]["step"]
        if step % self.config.validate_every and step != self.config.steps:
            return
        figures = self.measure.figures(step)
        rows[-1] |= {FIELD_PREFIX + name: _finite(value) for name, value in figures.items()}
        if self.keeps_best and self.best(rows)["step"] == step:
            with midstage.writing(self._folder(step)) as folder:
                checkpoints.save_parameters(module, folder / PARAMETERS)
            self._prune(step)

    def measured(self, rows: Sequence[Row]) -> list[Row]:
        return [row for row in rows if self.measure.field in row]

    def best(self, rows: Sequence[Row]) -> Row:
        """The best row, of equal ones the earliest."""
        return min(self.measured(rows), key=self.measure.cost)

    def is_over(self, rows: Sequence[Row]) -> bool:
        """Whether the last `patience` measures brought nothing better than those before them."""
        measured = self.measured(rows)
        since_best = len(measured) - 1 - measured.index(self.best(rows))
        return self.config.patience is not None and since_best >= self.config.patience

    def survives(self, rows: Sequence[Row]) -> bool:
        return self.keeps_best and math.isfinite(self.measure.cost(self.best(rows)))

    def can_continue(self, rows: Sequence[Row]) -> bool:
        """Whether the best state up to it is in scratch, sound."""
        return not self.keeps_best or midstage.is_sound(self._folder(self.best(rows)["step"]))

    def settle(self, module: nn.Module, rows: Sequence[Row]) -> None:
        step = self.kept_step(rows)
        if step == rows[-1]["step"]:
            return
        if not midstage.is_sound(self._folder(step)):
            raise StageError(f"the best state, of step {step}, is damaged: run the same command again; it is made anew")
        checkpoints.load_parameters(self._folder(step) / PARAMETERS, module)

    def kept_step(self, rows: Sequence[Row]) -> int:
        step: int = (self.best(rows) if self.keeps_best else rows[-1])["step"]
        return step

    def facts(self, rows: Sequence[Row]) -> Metrics:
        field, measured = self.measure.field, self.measured(rows)
        return {
            "kept_step": self.kept_step(rows),
            f"{field}_start": measured[0][field],
            f"{field}_best": self.best(rows)[field],
            f"{field}_last": measured[-1][field],
        }

    def shown(self, rows: Sequence[Row]) -> dict[str, float]:
        value = self.measured(rows)[-1][self.measure.field]
        return {} if value is None else {self.measure.field: value}

    def _folder(self, step: int) -> Path:
        return self.scratch / f"{PREFIX}{step:08d}"

    def _prune(self, best: int) -> None:
        """Remove the states that neither `best` nor a checkpoint needs."""
        needed = {best} | {self.best(rows)["step"] for rows in checkpoints.logs(self.scratch)}
        for folder in self.scratch.glob(f"{PREFIX}*"):
            if folder not in {self._folder(step) for step in needed}:
                midstage.remove(folder)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
