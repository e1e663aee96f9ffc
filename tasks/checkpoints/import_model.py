"""A model that comes from outside: found, fetched, looked at whole, and copied."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from artifacts.files import file_sha256
from tasks.checkpoints.files import INDEX, place, write_json
from tasks.checkpoints.folders import (
    CONFIG,
    CONFIG_FILES,
    TOKENIZER_FILES,
    model_files,
    read_base_folder,
)
from tasks.data.wording import first_line, shorten
from tasks.runtime.stage import StageError

COMMIT = re.compile(r"[0-9a-f]{40}")
ASK_SECONDS = 10
SECTIONS = ("quantization_config", "compression_config", "auto_map")
"""Of config.json, which transformers does not let be null."""
_BLOCK_BYTES = 2**24

Progress = Callable[[int, int, str], None]
"""Bytes done, bytes in all, the file."""


def folder_digest(path: Path) -> str:
    """sha256 of the names and contents of the model's files."""
    read_base_folder(path)
    total = hashlib.sha256()
    for name in model_files(path):
        total.update(_line(name, file_sha256(path / name)))
    return total.hexdigest()


def import_folder(path: Path, output: Path, progress: Progress) -> tuple[int, str]:
    """Copy the model's files and look at every tensor; returns their bytes and what `folder_digest` gives for them.

    They are copied, not linked: the store's files are read-only, and the user's folder must stay the user's to edit.
    Where config.json ties the head to the embeddings and the file's own head differs, the copy says what is.
    """
    from tasks.checkpoints.admission import admit

    folder = read_base_folder(path)
    names = model_files(path)
    total, done, digest = sum((path / name).stat().st_size for name in names), 0, hashlib.sha256()
    for name in names:
        digest.update(_line(name, _copy(path / name, output / name)))
        done += (output / name).stat().st_size
        progress(done, total, name)
    config = {name: value for name, value in folder.config.items() if name not in SECTIONS or value is not None}
    if config != folder.config:
        write_json(output / CONFIG, config)
    with _named(output, path):
        tied = admit(output)
    if not tied and config.get("tie_word_embeddings"):
        write_json(output / CONFIG, config | {"tie_word_embeddings": False})
    return total, digest.hexdigest()


@contextmanager
def _named(copy: Path, folder: Path) -> Iterator[None]:
    """What is wrong with the copy is told of the folder that the user can mend."""
    try:
        yield
    except StageError as error:
        told = re.sub(rf"\S*{re.escape(copy.name)}", lambda _: place(folder), str(error))
        raise StageError(told) from error


@cache  # asked once per process, so that all of a run means the same
def hub_commit(model: str, revision: str | None) -> str:
    """The commit that a hub model's revision (its default branch for None) is now; asks no network for a commit.

    Without a network it is the one that the local hub cache holds; StageError where there is none.
    """
    if revision is not None and COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        commit = HfApi().model_info(model, revision=revision, timeout=ASK_SECONDS).sha
    except Exception as error:  # the network's errors are of a dozen kinds
        wanted = f"{model} at {revision or 'its default branch'}"
        cached = (
            None if isinstance(error, HFValidationError) else try_to_load_from_cache(model, CONFIG, revision=revision)
        )
        if isinstance(cached, str):
            return Path(cached).parent.name
        raise _unreachable(wanted, error, "give the commit, revision=<40 digits>") from error
    if commit is None or not COMMIT.fullmatch(commit):
        raise StageError(f"the hub names no commit of {shorten(model)}: give one, base_model.revision=<40 digits>")
    return commit


def fetch(model: str, commit: str) -> Path:
    """The folder of exactly that commit in the local hub cache; StageError with the remedy if it cannot be fetched."""
    from huggingface_hub import snapshot_download

    patterns = [*CONFIG_FILES, *TOKENIZER_FILES, "*.safetensors", INDEX]
    try:
        return Path(snapshot_download(model, revision=commit, allow_patterns=patterns))
    except Exception as error:
        raise _unreachable(f"{model} at {commit[:12]}", error, "check the name and the network") from error


def _unreachable(wanted: str, error: BaseException, remedy: str) -> StageError:
    return StageError(
        f"cannot fetch {shorten(wanted, 50)}: it is no local folder, and the hub did not give it "
        f"({first_line(error, 50)}); {remedy} (a gated model needs `hf auth login`), or give a folder with "
        "--set base_model.model=PATH"
    )


def _line(name: str, digest: str) -> bytes:
    return f"{name}\0{digest}\n".encode()


def _copy(source: Path, target: Path) -> str:
    """Copy a file's content; returns its sha256."""
    digest = hashlib.sha256()
    with source.open("rb") as reading, target.open("wb") as writing:
        while block := reading.read(_BLOCK_BYTES):
            digest.update(block)
            writing.write(block)
    return digest.hexdigest()
