"""The stage that brings a full-precision model into the store: bundled, from a local folder, or from the hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import ClassVar

import artifacts
from tasks.runtime.bounds import Named
from tasks.runtime.stage import Context, Metrics, StageConfig, StageError, stage

BUNDLED = "bundled"
# A hub id is NAME or OWNER/NAME; anything else can only have been meant as a path.
_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")


class BaseModelConfig(StageConfig):
    location_fields: ClassVar[tuple[str, ...]] = ("model", "revision")
    model: Named = BUNDLED
    """"bundled", a local folder, or a hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub model, None for its default branch; the commit that it is enters the key."""


@stage(
    kind="checkpoint",
    gives=("base", "model"),
    source_digest=lambda config: source_digest(config),
)
def base_model(config: BaseModelConfig, context: Context) -> Metrics:
    """Copy the model's own files (configuration, safetensors, tokenizer) into the store, each looked at whole.

    What is copied is what the key says: a folder that changed since, or another commit, is refused.
    """
    from tasks.checkpoints.import_model import fetch, hub_commit, import_folder

    folder, commit = local_folder(config.model), ""
    if folder is None:
        commit = context.source_digest or hub_commit(config.model, config.revision)
        folder = fetch(config.model, commit)
    size, digest = import_folder(
        folder, context.output, lambda done, total, name: context.progress(done, total, unit="byte", file=name)
    )
    if not commit and context.source_digest not in (None, digest):
        raise StageError(
            f"the files in {str(folder)[-120:]} changed while they were copied: run the same command again"
        )
    return {"source": config.model, "revision": commit, "bytes": size}


def source_digest(config: BaseModelConfig) -> str:
    """What the stage will read: the sha256 of a folder's model files, or the commit of a hub model.

    Raises StageError if a local folder is missing or no model, or the hub cannot be asked.
    """
    from tasks.checkpoints.import_model import folder_digest, hub_commit

    folder = local_folder(config.model)
    return hub_commit(config.model, config.revision) if folder is None else folder_digest(folder)


def bundled_folder() -> Path:
    """Where the bundled model lies; StageError if this installation lacks it."""
    folder = Path(artifacts.__file__).parent / "bundled" / "model"
    if not folder.is_dir():
        raise StageError(
            f"the bundled model is not installed ({folder} is missing): run from a clone of the repository, or name "
            "another model with --set base_model.model=PATH"
        )
    return folder


def local_folder(model: str) -> Path | None:
    """The folder meant by `model`, or None for a hub id; StageError for a path that is not there."""
    if model == BUNDLED:
        return bundled_folder()
    try:
        path = Path(model).expanduser()
        if path.exists():
            return path
    except (OSError, ValueError, RuntimeError):  # a name too long, a null byte, an unknown ~user: no path
        pass
    if not _HUB_ID.fullmatch(model):
        raise StageError(f"no model folder at {model[:150]!s}: give a folder that exists, a hub id, or {BUNDLED!r}")
    return None
