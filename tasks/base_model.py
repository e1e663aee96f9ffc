"""The stage that brings a full-precision model into the store: bundled, from a local folder, or from the hub."""

from __future__ import annotations

import hashlib
import re
import shutil
from pathlib import Path
from typing import ClassVar

import artifacts
from tasks.checkpoints.folders import CONFIG_FILES, INDEX, TOKENIZER_FILES, check_model_folder, model_files
from tasks.runtime.stage import Context, Metrics, StageConfig, StageError, stage

BUNDLED = "bundled"
# A hub id is NAME or OWNER/NAME; anything else can only have been meant as a path.
_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")
_BLOCK_BYTES = 2**24


class BaseModelConfig(StageConfig):
    location_fields: ClassVar[tuple[str, ...]] = ("model",)
    model: str = BUNDLED
    """"bundled", a local folder, or a hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub model; a commit makes the run repeatable."""


@stage(kind="checkpoint", gives=("base", "model"), source_digest=lambda config: source_digest(config))
def base_model(config: BaseModelConfig, context: Context) -> Metrics:
    """Copy the model's own files (configuration, safetensors, tokenizer) into the store.

    They are copied, not linked: the store's files are read-only, and the user's folder must stay the user's to edit.
    """
    folder = local_folder(config.model)
    revision = None
    if folder is None:
        folder, revision = _fetch(config)
    check_model_folder(folder)
    names = model_files(folder)
    total = sum((folder / name).stat().st_size for name in names)
    done = 0
    for name in names:
        shutil.copyfile(folder / name, context.output / name)
        done += (folder / name).stat().st_size
        context.progress(done, total, unit="byte", file=name)
    return {"source": config.model, "revision": revision or "", "bytes": total}


def source_digest(config: BaseModelConfig) -> str:
    """sha256 of what the stage will read: file names and contents of a folder, id and revision of a hub model.

    Raises StageError if a local folder is missing or incomplete.
    """
    folder = local_folder(config.model)
    if folder is None:
        return hashlib.sha256(f"hub\0{config.model}\0{config.revision}".encode()).hexdigest()
    check_model_folder(folder)
    total = hashlib.sha256()
    for name in model_files(folder):
        total.update(f"{name}\0{_file_digest(folder / name)}\n".encode())
    return total.hexdigest()


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
    path = Path(model).expanduser()
    if path.exists():
        return path
    if not _HUB_ID.fullmatch(model):
        raise StageError(f"no model folder at {model}: give a folder that exists, a hub id, or {BUNDLED!r}")
    return None


def _fetch(config: BaseModelConfig) -> tuple[Path, str]:
    """(folder, commit) of a hub model in the local hub cache; StageError with the remedy where it cannot be fetched."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    patterns = [*CONFIG_FILES, *TOKENIZER_FILES, "*.safetensors", INDEX]
    try:
        folder = snapshot_download(config.model, revision=config.revision, allow_patterns=patterns)
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        wanted = config.model + (f" at revision {config.revision}" if config.revision else "")
        raise StageError(
            f"cannot fetch {wanted}: it is no local folder, and the hub did not give it ({_first_line(error)}). "
            "Check the name and the network (a gated model needs `hf auth login`), or fetch the model elsewhere and "
            "give its folder with --set base_model.model=PATH"
        ) from error
    return Path(folder), Path(folder).name


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def _file_digest(path: Path) -> str:
    total = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            total.update(block)
    return total.hexdigest()
