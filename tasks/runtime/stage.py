"""What a stage is: a typed configuration, named input artifacts, one output artifact, and all that a run must know.

A stage body is a plain function that reads its inputs once, calls pure code and writes one artifact folder.  It knows
nothing of caching, locks or Prefect: `execute.py` runs it under its key, and `prefect_tasks.py` shows it to Prefect.

A stage's file is read by every command, `--help` included, so it imports no torch, transformers, pandas or the like at
its top: the body imports the room where the work is done.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

TELEMETRY_FOLDER = "telemetry"

Metrics = dict[str, Any]
ProgressSink = Callable[[dict[str, Any]], None]


class StageConfig(BaseModel):
    """Base of every stage's configuration: frozen, and unknown keys are errors; numbers are finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    location_fields: ClassVar[tuple[str, ...]] = ()
    """Fields that say where something outside the store lies; a content digest stands for them in the key."""

    unkeyed_fields: ClassVar[tuple[str, ...]] = ()
    """Fields that change no bit of what a stage gives (when it saves, gives up, how it shares a machine): changing one
    keeps the key and the scratch.  A test proves it for each."""

    def keyed(self) -> dict[str, Any]:
        """The configuration as it enters a key: JSON data without the `unkeyed_fields`, those of sections included."""
        data = self.model_dump(mode="json", exclude=set(self.unkeyed_fields))
        sections = {name: getattr(self, name) for name in data}
        return data | {name: part.keyed() for name, part in sections.items() if isinstance(part, StageConfig)}


class StageError(Exception):
    """A stage cannot go on for a reason the user can mend; the message names the remedy and is shown as it is."""


@dataclass(frozen=True)
class Context:
    """What a running stage is given besides its configuration and inputs."""

    output: Path
    """An existing empty folder; everything written here is the artifact, so only deterministic bytes belong here."""
    scratch: Path
    """Survives a kill: the same key finds its mid-stage state here again."""
    device: str = "cpu"
    sink: ProgressSink | None = None
    input_digests: Mapping[str, str] = field(default_factory=dict)
    """Content digest of each input artifact, for provenance."""
    source_digest: str | None = None
    """What `Stage.source_digest` gave when the key was made: what is read from outside the store must still be that."""

    @property
    def telemetry(self) -> Path:
        """A folder for measurements of this execution (times, hardware), kept with the record and in no digest."""
        folder = self.scratch / TELEMETRY_FOLDER
        folder.mkdir(exist_ok=True)
        return folder

    def progress(self, done: float, total: int, unit: str = "step", **info: float | str) -> None:
        """Tell whoever watches that `done` of `total` units are finished."""
        if self.sink is not None:
            self.sink({"done": done, "total": total, "unit": unit, "info": info})

    def note(self, text: str) -> None:
        """Tell whoever watches, in a line of its own, what a user should know though the stage goes on."""
        if (note := getattr(self.sink, "note", None)) is not None:
            note(text)


@dataclass(frozen=True)
class Stage:
    """A stage body with what the workflow must know of it; made by `@stage`."""

    name: str
    kind: str
    version: str
    config_type: type[StageConfig]
    body: Callable[..., Metrics]
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    any_inputs: bool = False
    """The body takes `**artifacts: Path`: any number of inputs, named by its configuration."""
    reads: Mapping[str, str] = field(default_factory=dict)
    """For each input the branch's slot that it comes from: one of an earlier stage's `gives`, or a data section
    such as "train_data"."""
    gives: tuple[str, ...] = ()
    """The branch's slots that the output goes to; none for a data section, which is a slot of its own name."""
    source_digest: Callable[[Any], str] | None = None
    """Digests what the stage reads from outside the store under a configuration; raises StageError if it is missing."""
    check: Callable[[Any], None] | None = None
    """Raises StageError, before any stage computes, for what this machine lacks under a configuration."""
    log: str = ""
    """The training log among its files, for the report's curves; "" for none."""
    packages: Callable[[Any], tuple[str, ...]] = lambda config: ()
    """Distributions whose versions decide the result under a configuration."""
    chooses: Callable[[Any], Mapping[str, str]] = lambda config: {}
    """For each table of choices that the body looks into ("quant.methods.registry:METHODS") the entry that it takes
    under a configuration, so that the code of the others does not enter its key; a table left out counts as a whole."""
    fresh_process: Callable[[Any], bool] = lambda config: False
    """Whether it needs a worker process of its own: libraries whose threads and memory outlive a stage."""

    @property
    def module(self) -> str:
        return self.body.__module__

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by name: worker processes import the stage themselves."""
        return load_stage, (self.module, self.name)

    def __call__(self, config: StageConfig, context: Context, **inputs: Path) -> Metrics:
        return self.body(config, context, **inputs)

    def check_inputs(self, names: Mapping[str, Any]) -> None:
        """Raise TypeError when an input is missing or unknown."""
        missing = set(self.required) - set(names)
        unknown = set() if self.any_inputs else set(names) - set(self.required) - set(self.optional)
        if missing or unknown:
            raise TypeError(f"stage {self.name}: missing inputs {sorted(missing)}, unknown inputs {sorted(unknown)}")


_DECLARED: dict[type[StageConfig], Stage] = {}


def stage_of(config_type: type[StageConfig]) -> Stage:
    """The stage whose body takes this configuration; KeyError if none was declared."""
    return _DECLARED[config_type]


def load_stage(module: str, name: str) -> Stage:
    """The stage `name` declared in `module`, for example ("tasks.kd_train", "kd_train")."""
    found: Stage = getattr(importlib.import_module(module), name)
    return found


def stage(*, kind: str, version: str = "1", **declared: Any) -> Callable[[Callable[..., Metrics]], Stage]:
    """Declare a stage: `def body(config: SomeConfig, context: Context, *, input: Path, other: Path | None = None)`.

    Keyword-only parameters are the input artifacts; those with a default are optional.  `declared` are further fields
    of `Stage`: all that the workflow knows of a stage is said here.  Raises TypeError where `reads` names no input.
    """

    def declare(body: Callable[..., Metrics]) -> Stage:
        parameters = inspect.signature(body, eval_str=True).parameters
        inputs = [p for p in parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY]
        if unknown := set(declared.get("reads", ())) - {p.name for p in inputs}:
            raise TypeError(f"stage {body.__name__}: reads names {sorted(unknown)}, which are no inputs of its body")
        declared_stage = Stage(
            name=body.__name__,
            kind=kind,
            version=version,
            config_type=parameters["config"].annotation,
            body=body,
            required=tuple(p.name for p in inputs if p.default is inspect.Parameter.empty),
            optional=tuple(p.name for p in inputs if p.default is not inspect.Parameter.empty),
            any_inputs=any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()),
            **declared,
        )
        _DECLARED[declared_stage.config_type] = declared_stage
        return declared_stage

    return declare
