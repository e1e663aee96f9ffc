"""Files of a model folder, read so that whatever lies there is a value or one StageError, and JSON written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from tasks.data.wording import MOST_CHARS, first_line, listed, shorten
from tasks.runtime.stage import StageError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
MOST_JSON_BYTES = 2**28
FETCH = "fetch the file anew"
_PLACE_CHARS = 110


@dataclass(frozen=True)
class TensorInfo:
    """What a shard's header says of a tensor."""

    shard: str
    dtype: str
    """As safetensors names it."""
    shape: tuple[int, ...]

    @property
    def value_bytes(self) -> int:
        """Of one value; the type's name ends in its bits (BF16, F32)."""
        return int(self.dtype.lstrip("BFIU")) // 8


def refused(path: Path, what: str, remedy: str) -> StageError:
    """One message of at most MOST_CHARS characters: the file or folder, what is wrong with it, what to do."""
    room = MOST_CHARS - _PLACE_CHARS - len(": ; ") - len(remedy)
    return StageError(f"{place(path)}: {shorten(what, room)}; {remedy}")


def place(path: Path) -> str:
    """A file or folder as a message names it."""
    text = str(path) if len(str(path)) <= _PLACE_CHARS else "…" + str(path)[1 - _PLACE_CHARS :]
    return shorten(text, _PLACE_CHARS)


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds; StageError for anything else."""
    try:
        if not path.is_file():
            raise refused(path.parent, f"it lacks {path.name}", "copy it there, or give another folder")
        if path.stat().st_size > MOST_JSON_BYTES:
            raise refused(path, f"it has over {MOST_JSON_BYTES >> 20} MiB, which no model's file has", FETCH)
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise refused(
            path, f"it cannot be read ({error.strerror})", "make it readable, or give another folder"
        ) from error
    except (ValueError, RecursionError) as error:
        raise refused(path, f"it is no valid JSON ({first_line(error)})", FETCH) from error
    if not isinstance(content, dict):
        raise refused(path, f"it holds a {type(content).__name__}, not an object", FETCH)
    return content


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def weight_files(path: Path) -> list[str]:
    """The names of a folder's safetensors shards in order; StageError if one is missing or the weights are pickled."""
    if (path / WEIGHTS).is_file():
        return [WEIGHTS]
    if (path / INDEX).is_file():
        return sorted(set(_weight_map(path).values()))
    pickled = sorted(file.name for file in path.iterdir() if file.suffix in PICKLED_SUFFIXES)
    if pickled:
        raise refused(
            path,
            f"it holds pickled weights only ({listed(pickled, 40)}), which can run code when read",
            "convert them where you trust them, with from_pretrained(...).save_pretrained(...)",
        )
    raise refused(path, f"it has no weights: {WEIGHTS} or {INDEX} with its shards is missing", "copy them there")


def tensor_infos(path: Path) -> dict[str, TensorInfo]:
    """All tensors of a folder by name; StageError where shards are damaged, or shards and index disagree."""
    shards = weight_files(path)
    found: dict[str, TensorInfo] = {}
    for shard in shards:
        for name, info in read_header(path / shard).items():
            if name in found:
                raise refused(
                    path / shard, f"{name} lies in {found[name].shard} too", "keep one of the two, or " + FETCH
                )
            found[name] = info
    if shards != [WEIGHTS]:
        index = _weight_map(path)
        wrong = [name for name in {*index, *found} if name not in found or index.get(name) != found[name].shard]
        if wrong:
            raise refused(path / INDEX, f"it and the shards disagree on where {listed(sorted(wrong), 80)} lies", FETCH)
    return found


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file by name; StageError if it is damaged."""
    try:
        with safe_open(path, framework="np") as shard:
            slices = {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118 (a handle is no dict)
            return {n: TensorInfo(path.name, s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise refused(
            path, f"it is damaged, incomplete, or only a git-lfs pointer ({first_line(error)})", FETCH
        ) from error


def _weight_map(path: Path) -> dict[str, str]:
    """The shard of each tensor as the index names it; StageError for names of files that are not in the folder."""
    index = read_json(path / INDEX)
    found = index.get("weight_map")
    if not isinstance(found, dict) or not found or not all(isinstance(shard, str) for shard in found.values()):
        raise refused(path / INDEX, "its weight_map does not name a file for each tensor", FETCH)
    outside = sorted(n for n in set(found.values()) if Path(n).name != n or not n.endswith(".safetensors"))
    if outside:
        raise refused(path / INDEX, f"it names {listed(outside, 80)}, no safetensors file of its folder", FETCH)
    missing = sorted(name for name in set(found.values()) if not (path / name).is_file())
    if missing:
        raise refused(path, f"weight files that its index names are missing: {listed(missing, 80)}", "copy them there")
    if not isinstance(index.get("metadata"), dict):  # transformers insists on it
        raise refused(path / INDEX, "it has no metadata", 'add "metadata": {} to it, or ' + FETCH)
    return found
