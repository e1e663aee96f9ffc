"""What a model folder must hold: configuration, safetensors, tokenizer.  Checked before anything large is read.

Only safetensors are read, and no code that a folder brings along is run.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from tasks.runtime.stage import StageError

ARCHITECTURES = ("Qwen2ForCausalLM", "Qwen3ForCausalLM", "LlamaForCausalLM")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIG_FILES = ("config.json", "generation_config.json")
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
PICKLED_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


def check_model_folder(path: Path) -> dict[str, Any]:
    """The parsed config.json of a folder that `load_model` can load; StageError names what is wrong and the remedy.

    Of quantized checkpoints only our own are accepted.
    """
    if not path.is_dir():
        raise StageError(f"no model folder at {path}: give the folder that holds config.json and {WEIGHTS}")
    config = read_json(path / "config.json")
    architecture = (config.get("architectures") or ["none"])[0]
    if architecture not in ARCHITECTURES:
        raise StageError(f"{path}: architecture {architecture} is not supported; use one of {', '.join(ARCHITECTURES)}")
    if (method := quant_method(config)) not in (None, QUANT_METHOD):
        raise StageError(f"{path} is already quantized ({method}): give the full-precision checkpoint it was made from")
    for shard in weight_files(path):
        check_shard(path / shard)
    if not any(all((path / name).is_file() for name in files) for files in VOCABULARY_FILES):
        raise StageError(f"{path} has no tokenizer: copy tokenizer.json and tokenizer_config.json into the folder")
    _check_vocabulary(path, int(config["vocab_size"]))
    return config


def quant_method(config: Mapping[str, Any]) -> str | None:
    """The quantization method that a parsed config.json names; None for a plain checkpoint."""
    if "quantization_config" not in config:
        return None
    return str(config["quantization_config"].get("quant_method", "unknown"))


def weight_files(path: Path) -> list[str]:
    """The names of a folder's safetensors shards in order; StageError if one is missing or the weights are pickled."""
    if (path / WEIGHTS).is_file():
        return [WEIGHTS]
    if (path / INDEX).is_file():
        shards = sorted(set(read_json(path / INDEX)["weight_map"].values()))
        missing = [name for name in shards if Path(name).name != name or not (path / name).is_file()]
        if missing:
            raise StageError(f"{path} lacks weight files that its index names: {', '.join(missing)}; copy them there")
        return shards
    pickled = sorted(file.name for file in path.iterdir() if file.suffix in PICKLED_SUFFIXES)
    if pickled:
        raise StageError(
            f"{path} holds pickled weights only ({', '.join(pickled)}), which can run code when read: convert them "
            f"where you trust them, with transformers' from_pretrained(...).save_pretrained(...), to {WEIGHTS}"
        )
    raise StageError(f"{path} has no weights: {WEIGHTS} or {INDEX} with its shards is missing")


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


def check_shard(path: Path) -> list[str]:
    """The names of the tensors in a safetensors file; StageError if it is damaged."""
    try:
        with safe_open(path, framework="pt") as shard:
            return list(shard.keys())
    except (SafetensorError, OSError) as error:
        raise StageError(
            f"{path} is damaged, incomplete, or only a git-lfs pointer ({error}): fetch the file anew"
        ) from error


def _check_vocabulary(path: Path, num_embeddings: int) -> None:
    from tasks.checkpoints.tokenizer import load_tokenizer

    num_tokens = max(load_tokenizer(path).get_vocab().values()) + 1
    if num_tokens > num_embeddings:
        raise StageError(
            f"{path}: the tokenizer has {num_tokens} tokens but the model only {num_embeddings} embeddings: "
            "this is another model's tokenizer; copy the tokenizer files that belong to the weights"
        )


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise StageError(f"{path.parent} lacks {path.name}: copy it there, or give another folder") from error
    except ValueError as error:
        raise StageError(f"{path} is no valid JSON ({error}): fetch the file anew") from error


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
