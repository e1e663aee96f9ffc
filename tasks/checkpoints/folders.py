"""What a model folder must hold: configuration, safetensors, tokenizer.  Checked before anything large is read.

The one reader of model folders: all that reads one asks here.  Where config.json and the tensors in the files differ,
the tensors are right.  Only safetensors are read, and no code that a folder brings along is run; nothing here needs
torch or transformers, whose own reading of the folder is `skeleton.py`.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quant.decoder import EMBEDDING, HEAD, LAYERS, MODEL_TYPES
from quant.grids.scheme import Scheme
from tasks.checkpoints.configuration import check_configuration, check_token_ids
from tasks.checkpoints.files import (
    FETCH,
    INDEX,
    WEIGHTS,
    TensorInfo,
    read_json,
    refused,
    tensor_infos,
    weight_files,
    write_json,
)
from tasks.data.wording import first_line, listed, shorten
from tasks.runtime.stage import StageError

__all__ = ["INDEX", "WEIGHTS", "read_json", "weight_files", "write_json"]

ARCHITECTURES = tuple(MODEL_TYPES)
CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
CONFIG_FILES = (CONFIG, GENERATION_CONFIG)
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)
# Any one of these sets makes a tokenizer.
VOCABULARY_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("tokenizer.model",))
QAT_FOLDER, SCHEME_FILE = "qat", "scheme.json"
# In the folder below, where no tool that loads every safetensors file of a checkpoint looks.
ONLINE_FILE = "online.safetensors"
# What config.json calls a checkpoint that computes as it should only behind our quantizers of activations and caches.
QUANT_METHOD = "reasoning_qat"
FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""The types of weights, as safetensors and as config.json name them."""


@dataclass(frozen=True)
class ModelFolder:
    """A folder that passed the checks: its parsed config.json, and its tensors by name."""

    path: Path
    config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]

    @property
    def shards(self) -> list[str]:
        return sorted({tensor.shard for tensor in self.tensors.values()})

    @property
    def has_own_head(self) -> bool:
        """Whether the output embeddings lie in the files; whatever config.json says, they are then the model's."""
        return HEAD in self.tensors

    @property
    def is_quantized(self) -> bool:
        """Whether it is one of our quantized checkpoints."""
        return (self.path / QAT_FOLDER).is_dir() or quant_method(self.config) == QUANT_METHOD

    @property
    def dtype(self) -> str:
        """The dtype to compute in: config.json's, unless its range is less than that of the weights in the files."""
        said = self.config.get("dtype") or self.config.get("torch_dtype")
        stored = {FLOATS[tensor.dtype] for tensor in self.tensors.values()}
        if said in FLOATS.values() and (said != "float16" or stored == {"float16"}):
            return str(said)
        return stored.pop() if len(stored) == 1 else "float32"


def read_model_folder(path: Path) -> ModelFolder:
    """The folder, if it is a model that can be loaded; otherwise StageError with the file, the cause and the remedy.

    Of quantized checkpoints only our own are accepted.
    """
    if not path.is_dir():
        raise StageError(f"no model folder at {shorten(path, 150)}: give the folder that holds {CONFIG} and {WEIGHTS}")
    try:
        return _read(path)
    except OSError as error:
        raise refused(path, f"it cannot be read ({first_line(error)})", "make it readable, or give another") from error


def _read(path: Path) -> ModelFolder:
    config = read_json(path / CONFIG)
    _check_architecture(path / CONFIG, config)
    check_configuration(config, lambda what: refused(path / CONFIG, what, FETCH))
    tensors = tensor_infos(path)
    if not any(all((path / name).is_file() for name in names) for names in VOCABULARY_FILES):
        raise refused(path, "it has no tokenizer", "copy tokenizer.json and tokenizer_config.json into the folder")
    _check_vocabulary(path, config["vocab_size"])
    _check_tensors(path, config, tensors)
    if (path / GENERATION_CONFIG).is_file():
        generation = read_json(path / GENERATION_CONFIG)
        check_token_ids(
            generation,
            config["vocab_size"],
            lambda what: refused(path / GENERATION_CONFIG, what, "mend it, or delete the file"),
        )
    return ModelFolder(path, config, tensors)


def read_base_folder(path: Path) -> ModelFolder:
    """The folder of a full-precision model; StageError for one of our quantized checkpoints too."""
    folder = read_model_folder(path)
    if folder.is_quantized:
        raise refused(
            path,
            f"it is a quantized checkpoint of ours ({scheme_name(path)})",
            "give the model that it was made from, or go on from it with checkpoint=DIGEST and no ptq_init",
        )
    return folder


def check_model_folder(path: Path) -> dict[str, Any]:
    """The parsed config.json of a folder that `read_model_folder` accepts."""
    return read_model_folder(path).config


def quant_method(config: Mapping[str, Any]) -> str | None:
    """The quantization method that a parsed config.json names; None for a plain checkpoint."""
    found = config.get("quantization_config") or config.get("compression_config")
    if not found:
        return None
    return str(found.get("quant_method", "unknown")) if isinstance(found, dict) else "unknown"


def scheme_name(path: Path) -> str:
    """How a checkpoint's weights are quantized ("W3G128"), or their type ("BF16"); StageError if it is none."""
    if not (path / CONFIG).is_file():
        raise refused(path, "it holds no model", "give the digest of a checkpoint, as `ls` shows them")
    if not (path / QAT_FOLDER).is_dir():
        return {"float32": "FP32", "float16": "FP16"}.get(read_model_folder(path).dtype, "BF16")
    return read_scheme(path)[0].name


def read_scheme(path: Path) -> tuple[Scheme, bool]:
    """The scheme of a QAT checkpoint and whether its transforms are learned; StageError for a folder without `qat/`."""
    file = path / QAT_FOLDER / SCHEME_FILE
    if not file.is_file():
        raise refused(path, f"it is no QAT checkpoint (no {QAT_FOLDER}/{SCHEME_FILE})", "make one with ptq_init first")
    content = read_json(file)
    try:
        return Scheme.from_dict(content["scheme"]), bool(content["learned_transforms"])
    except (KeyError, TypeError, ValueError) as error:
        raise refused(
            file, f"it is not what this version writes ({first_line(error)})", "run ptq_init again"
        ) from error


def model_files(path: Path) -> list[str]:
    """All files of a folder that belong to the model: configuration, safetensors, tokenizer."""
    index = [INDEX] if not (path / WEIGHTS).is_file() else []
    optional = [name for name in (*CONFIG_FILES, *TOKENIZER_FILES) if (path / name).is_file()]
    return sorted([*optional, *weight_files(path), *index])


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the tokenizer files, chat template included, as they are."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _check_architecture(file: Path, config: Mapping[str, Any]) -> None:
    named = config.get("architectures")
    architecture = named[0] if isinstance(named, list) and named else "none"
    if architecture not in ARCHITECTURES:
        raise refused(file, f"architecture {architecture} is not supported", f"use one of {', '.join(ARCHITECTURES)}")
    if config.get("model_type") != MODEL_TYPES[architecture]:
        raise refused(file, f"model_type {config.get('model_type')!r} does not go with {architecture}", FETCH)
    if (method := quant_method(config)) not in (None, QUANT_METHOD):
        raise refused(
            file, f"the model is already quantized ({method})", "give the full-precision checkpoint it was made from"
        )


def _check_vocabulary(path: Path, num_embeddings: int) -> None:
    num_tokens = _highest_token(path) + 1
    if num_tokens > num_embeddings:
        raise refused(
            path,
            f"the tokenizer has {num_tokens} tokens but the model only {num_embeddings} embeddings",
            "this is another model's tokenizer: copy the files that belong to the weights",
        )


def _highest_token(path: Path) -> int:
    """By tokenizer.json; -1 for a folder without, whose vocabulary transformers reads."""
    file = path / "tokenizer.json"
    if not file.is_file():
        return -1
    content = read_json(file)
    try:
        vocabulary = content["model"]["vocab"]
        last = max(vocabulary.values()) if isinstance(vocabulary, dict) else len(vocabulary) - 1
        return int(max([last, *(token["id"] for token in content.get("added_tokens") or [])]))
    except (KeyError, TypeError, ValueError) as error:
        raise refused(file, f"it is no tokenizer ({first_line(error)})", FETCH) from error


def _check_tensors(path: Path, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> None:
    """The sizes from which all else is made; every tensor's shape is compared where the model is built."""
    foreign = sorted({tensor.dtype for tensor in tensors.values()} - set(FLOATS))
    if foreign:
        raise refused(
            path,
            f"it holds tensors of type {listed(foreign)}, so it is already quantized, or no model",
            "give the full-precision checkpoint it was made from",
        )
    if EMBEDDING not in tensors:
        raise refused(path, f"the weights do not fit its {CONFIG}: {EMBEDDING} is missing", "fetch the checkpoint anew")
    numbers = {name.split(".")[2] for name in tensors if name.startswith(f"{LAYERS}.")}
    said = (config["vocab_size"], config["hidden_size"], config["num_hidden_layers"])
    found = (*tensors[EMBEDDING].shape, len(numbers))
    if found != said:
        raise refused(
            path,
            f"the weights do not fit its {CONFIG}: vocabulary, hidden size and layers are {found}, not {said}",
            f"copy the {CONFIG} that belongs to the weights",
        )
    if HEAD not in tensors and config.get("tie_word_embeddings") is False:
        raise refused(
            path,
            f"the weights do not fit its {CONFIG}: {HEAD} is missing, which tie_word_embeddings=false asks for",
            "set it to true if the head is the embeddings, or fetch the checkpoint anew",
        )
