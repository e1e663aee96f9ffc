"""Model folders that people have, or that somebody made: each is a model that loads, or one short message."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quant.grids.scheme import Scheme
from tasks.checkpoints.folders import scheme_name
from tasks.checkpoints.import_model import folder_digest, import_folder
from tasks.checkpoints.models import load_model, load_tokenizer
from tasks.checkpoints.stream import CheckpointStream
from tasks.ptq_init import PTQInitConfig, check_fits
from tasks.runtime.stage import StageError

Damage = Callable[[Path], Any]
CONFIG, GENERATION, TOKENIZER = "config.json", "generation_config.json", "tokenizer.json"
WEIGHTS, INDEX, TEMPLATE = "model.safetensors", "model.safetensors.index.json", "chat_template.jinja"
NAME = "model.layers.0.mlp.up_proj.weight"
FIRST, SECOND = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))


def edit(file: str, **changes: Any) -> Damage:
    """Set fields of a JSON file; a value of `...` deletes the field."""

    def damage(folder: Path) -> None:
        path = folder / file
        content = json.loads(path.read_text()) if path.is_file() else {}
        content.update(changes)
        path.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))

    return damage


def write(file: str, content: str | bytes) -> Damage:
    return lambda folder: (folder / file).write_bytes(content.encode() if isinstance(content, str) else content)


def both(*damages: Damage) -> Damage:
    return lambda folder: [damage(folder) for damage in damages]


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Damage:
    def damage(folder: Path) -> None:
        content = load_file(folder / WEIGHTS)
        change(content)
        save_file(content, folder / WEIGHTS, metadata={"format": "pt"})

    return damage


def header(content: Any) -> Damage:
    """A weight file of this header (a JSON value) and no data."""

    def damage(folder: Path) -> None:
        encoded = json.dumps(content).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(encoded)) + encoded)

    return damage


def sharded(change: Callable[[dict[str, Any], Path], Any]) -> Damage:
    """Two shards with an index, then `change(index, folder)`."""

    def damage(folder: Path) -> None:
        content = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        names = sorted(content)
        parts = {FIRST: names[::2], SECOND: names[1::2]}
        for shard, own in parts.items():
            save_file({name: content[name] for name in own}, folder / shard, metadata={"format": "pt"})
        index = {"metadata": {}, "weight_map": {name: shard for shard, own in parts.items() for name in own}}
        change(index, folder)
        (folder / INDEX).write_text(json.dumps(index))

    return damage


def replace_by(file: str, make: Callable[[Path], Any]) -> Damage:
    def damage(folder: Path) -> None:
        (folder / file).unlink()
        make(folder / file)

    return damage


def point(index: dict[str, Any], where: Any) -> None:
    index["weight_map"][NAME] = where


REFUSED: dict[str, tuple[str, Damage]] = {
    # config.json as a file
    **{
        f"config: {what}": (CONFIG, write(CONFIG, content))
        for what, content in {
            "empty": "",
            "list": "[]",
            "null": "null",
            "number": "7",
            "text": '"qwen3"',
            "cut": '{"vocab_size": 3',
            "byte order mark": b"\xef\xbb\xbf{}",
            "latin-1": '{"name": "caf\xe9"}'.encode("latin-1"),
            "utf-16": '{"a": 1}'.encode("utf-16"),
            "deep": "[" * 100_000 + "]" * 100_000,
            "deep object": '{"a":' * 50_000 + "1" + "}" * 50_000,
            "long number": '{"vocab_size": ' + "9" * 5000 + "}",
            "binary": bytes(range(256)),
            "empty object": "{}",
        }.items()
    },
    "config: missing": (CONFIG, lambda folder: (folder / CONFIG).unlink()),
    "config: folder": (CONFIG, replace_by(CONFIG, Path.mkdir)),
    "config: link to itself": (CONFIG, replace_by(CONFIG, lambda path: path.symlink_to(path.name))),
    "config: pipe": (CONFIG, replace_by(CONFIG, os.mkfifo)),
    # values of config.json
    **{
        f"{field}={value!r:.30}": (CONFIG, edit(CONFIG, **{field: value}))
        for field, values in {
            "architectures": [None, [], "Qwen3ForCausalLM", ["GPT2LMHeadModel"], [None], [7], {}, ...],
            "model_type": ["gpt2", None, "llama", ["qwen3"], "../x", ...],
            "vocab_size": [10**9, 0, -1, "320", None, 320.0, True, float("nan"), 10**400, [320], ...],
            "hidden_size": [10**9, 0, "64", None, 63, ...],
            "intermediate_size": [0, -96, "96", None, {}],
            "num_hidden_layers": [10**9, 0, -2, "2", None, 1, 3],
            "num_attention_heads": [0, 3, "4", None],
            "num_key_value_heads": [0, 3, 10**9, "2"],
            "head_dim": [0, -32, "32", 31, 10**9],
            "max_position_embeddings": [0, "256", -1, 2**40],
            "rms_norm_eps": [float("nan"), float("inf"), -1, "1e-6", None],
            "rope_parameters": [[], "default", 7, {"rope_type": "unheard of", "rope_theta": 1.0}],
            "tie_word_embeddings": ["yes", 7, {}],
            "dtype": ["int8", "float8_e4m3fn", "bfloat17", 16, ["bfloat16"], {}],
            "hidden_act": ["unheard of", None, 7],
            "layer_types": [["full_attention"], "full_attention", ["unheard of"] * 2, [7, 7]],
            "eos_token_id": [320, -1, "1", [4, 10**9], {}, 1.5, True],
            "pad_token_id": [320, -2, "0", [0]],
            "quantization_config": [
                {"quant_method": "gptq", "bits": 4},
                {"quant_method": "awq"},
                {"quant_method": "bitsandbytes", "load_in_4bit": True},
                {"quant_method": "fp8"},
                {"quant_method": "compressed-tensors"},
                {"quant_method": None},
                {"bits": 4},
                "gptq",
                ["awq"],
            ],
        }.items()
        for value in values
    },
    "rope: theta is zero": (CONFIG, edit(CONFIG, rope_parameters={"rope_type": "default", "rope_theta": 0})),
    "rope: theta is text": (CONFIG, edit(CONFIG, rope_parameters={"rope_type": "default", "rope_theta": "much"})),
    "rope: factor is not a number": (
        CONFIG,
        edit(CONFIG, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": float("nan")}),
    ),
    # weights
    "weights: missing": ("no weights", lambda folder: (folder / WEIGHTS).unlink()),
    "weights: pickled": ("pickled", lambda folder: (folder / WEIGHTS).rename(folder / "pytorch_model.bin")),
    "weights: empty": (WEIGHTS, write(WEIGHTS, "")),
    "weights: text": (WEIGHTS, write(WEIGHTS, "version https://git-lfs.github.com/spec/v1\n")),
    "weights: cut": (WEIGHTS, lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-9])),
    "weights: longer": (WEIGHTS, lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes() + b"x")),
    "weights: header of exabytes": (WEIGHTS, write(WEIGHTS, struct.pack("<Q", 2**60) + b"{}")),
    "weights: no header": (WEIGHTS, write(WEIGHTS, struct.pack("<Q", 0))),
    "weights: header is a list": (WEIGHTS, header([])),
    "weights: no tensors": ("embed_tokens", header({})),
    "weights: offsets overlap": (
        WEIGHTS,
        header({n: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for n in ("a", "b")}),
    ),
    "weights: shape of terabytes": (
        WEIGHTS,
        header({NAME: {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 0]}}),
    ),
    "weights: negative shape": (WEIGHTS, header({NAME: {"dtype": "F32", "shape": [-1], "data_offsets": [0, 0]}})),
    "weights: loop of links": (
        "no weights",
        lambda folder: ((folder / WEIGHTS).unlink(), (folder / WEIGHTS).symlink_to(folder / WEIGHTS)),
    ),
    "weights: dangling link": (
        "no weights",
        lambda folder: ((folder / WEIGHTS).unlink(), (folder / WEIGHTS).symlink_to("/absent/blob")),
    ),
    "tensor: missing": (NAME, tensors(lambda t: t.pop(NAME))),
    "tensor: unexpected": ("adapter", tensors(lambda t: t.update({"adapter": torch.zeros(1)}))),
    "tensor: of a further layer": ("layers", tensors(lambda t: t.update({NAME.replace("0", "7"): t[NAME].clone()}))),
    "tensor: too small": (NAME, tensors(lambda t: t.update({NAME: t[NAME][:-1].contiguous()}))),
    "tensor: flat": (NAME, tensors(lambda t: t.update({NAME: t[NAME].flatten()}))),
    "tensor: bytes": ("already quantized", tensors(lambda t: t.update({NAME: t[NAME].to(torch.int8)}))),
    "tensor: float8": ("already quantized", tensors(lambda t: t.update({NAME: t[NAME].to(torch.float8_e4m3fn)}))),
    "tensor: packed beside scales": (
        "already quantized",
        tensors(lambda t: t.update({NAME.replace("weight", "qweight"): torch.zeros(8, 8, dtype=torch.int32)})),
    ),
    "vocabulary grew": ("vocabulary", edit(CONFIG, vocab_size=321)),
    "untied without a head": ("lm_head", edit(CONFIG, tie_word_embeddings=False)),
    # index
    "index: missing shard": (
        "missing",
        sharded(lambda index, folder: (folder / SECOND).unlink()),
    ),
    "index: outside": (INDEX, sharded(lambda index, folder: point(index, "../../etc/passwd"))),
    "index: absolute": (INDEX, sharded(lambda index, folder: point(index, "/etc/passwd"))),
    "index: number": (INDEX, sharded(lambda index, folder: point(index, 7))),
    "index: null": (INDEX, sharded(lambda index, folder: point(index, None))),
    "index: pickled": (INDEX, sharded(lambda index, folder: point(index, "model-00001.bin"))),
    "index: itself": (INDEX, sharded(lambda index, folder: point(index, INDEX))),
    "index: wrong shard": (
        INDEX,
        sharded(lambda index, f: index["weight_map"].update(dict.fromkeys(index["weight_map"], FIRST))),
    ),
    "index: tensor left out": (INDEX, sharded(lambda index, folder: index["weight_map"].pop(NAME))),
    "index: tensor invented": (
        INDEX,
        sharded(lambda index, folder: index["weight_map"].update(ghost=FIRST)),
    ),
    "index: no metadata": (INDEX, sharded(lambda index, folder: index.pop("metadata"))),
    "index: no map": (INDEX, sharded(lambda index, folder: index.pop("weight_map"))),
    "index: map is a list": (INDEX, sharded(lambda index, folder: index.update(weight_map=[]))),
    "index: duplicates": (
        "too",
        sharded(lambda index, f: save_file(load_file(f / FIRST) | load_file(f / SECOND), f / SECOND)),
    ),
    # tokenizer
    "tokenizer: missing": ("no tokenizer", lambda folder: (folder / TOKENIZER).unlink()),
    **{
        f"tokenizer: {what}": (TOKENIZER, write(TOKENIZER, content))
        for what, content in {
            "empty": "",
            "null": "null",
            "empty object": "{}",
            "model is null": '{"model": null}',
            "vocabulary is null": '{"model": {"vocab": null}}',
            "ids are text": '{"model": {"vocab": {"a": "b"}}}',
            "vocabulary is empty": '{"model": {"vocab": {}}}',
        }.items()
    },
    "tokenizer: unknown kind": ("tokenizer", edit(TOKENIZER, model={"type": "Unheard", "vocab": {"a": 1}})),
    "tokenizer: another model's": ("embeddings", edit(TOKENIZER, added_tokens=[{"id": 10**6, "content": "x"}])),
    "tokenizer: no tokens": ("tokenizer", edit(TOKENIZER, model={"type": "BPE", "vocab": {"é": 1}, "merges": []})),
    "tokenizer: configuration is a list": ("tokenizer", write("tokenizer_config.json", "[]")),
    "tokenizer: configuration is cut": ("tokenizer", write("tokenizer_config.json", "{")),
    "tokenizer: class unknown": ("tokenizer", edit("tokenizer_config.json", tokenizer_class=7)),
    "tokenizer: no end": ("eos_token", edit("tokenizer_config.json", eos_token=None)),
    # generation_config.json
    **{
        f"generation: {what}": (GENERATION, write(GENERATION, content))
        for what, content in {
            "empty": "",
            "list": "[]",
            "null": "null",
            "end beyond": '{"eos_token_id": 320}',
            "end is text": '{"eos_token_id": "</s>"}',
            "ends are text": '{"eos_token_id": ["</s>"]}',
            "padding beyond": '{"pad_token_id": 99999}',
            "begin is a list": '{"bos_token_id": [1]}',
        }.items()
    },
    # chat templates; every kind that tasks.data knows has its test there
    **{
        f"template: {what}": ("chat_template", write(TEMPLATE, content))
        for what, content in {
            "cut": "{% for m in messages %}",
            "refuses": "{{ raise_exception('no') }}",
            "dunder": "{{ messages.__class__.__base__.__subclasses__() }}",
            "forgets": "{{ 'hello' }}",
            "endless": "{% for a in range(99999) %}{% for b in range(99999) %}{{ a }}{% endfor %}{% endfor %}",
            "random": "{% for m in messages %}{{ m.content }}{% endfor %}{{ [1, 2] | random }}",
        }.items()
    },
}

LOADS: dict[str, Damage] = {
    "as it is": lambda folder: None,
    "sharded": sharded(lambda index, folder: None),
    "no generation configuration": lambda folder: (folder / GENERATION).unlink(),
    "no end in the generation configuration": edit(GENERATION, eos_token_id=None),
    "several ends": edit(GENERATION, eos_token_id=[1, 4]),
    "null sections": edit(CONFIG, quantization_config=None, rope_scaling=None, auto_map=None),
    "older name of the dtype": edit(CONFIG, dtype=..., torch_dtype="bfloat16"),
    "no dtype": edit(CONFIG, dtype=...),
    "padding by minus one": edit(CONFIG, pad_token_id=-1),
    "unknown fields": edit(CONFIG, made_by="somebody", nested={"a": [1, {"b": None}]}),
    "code of its own": both(
        edit(CONFIG, auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}),
        write("evil.py", "raise SystemExit('ran')"),
    ),
    "linked weights, as the hub's cache has them": lambda folder: (
        (folder / WEIGHTS).rename(folder.parent / "blob"),
        (folder / WEIGHTS).symlink_to(folder.parent / "blob"),
    ),
    "pickled weights beside": write("pytorch_model.bin", b"\x80\x04."),
    "no template": lambda folder: (folder / TEMPLATE).unlink(),
}


def enter(folder: Path, output: Path) -> None:
    """As the base_model stage does: digest, copy, look at everything; then what every later stage does."""
    folder_digest(folder)
    output.mkdir()
    import_folder(folder, output, lambda done, total, name: None)
    load_tokenizer(output)
    logits = load_model(output, torch.float32)(input_ids=torch.arange(20)[None]).logits
    assert bool(logits.isfinite().all())


@pytest.mark.parametrize("names, damage", REFUSED.values(), ids=REFUSED)
def test_what_is_no_model_is_one_short_message(make_model_folder, tmp_path, names, damage):
    folder = make_model_folder("qwen3")
    damage(folder)
    with pytest.raises(StageError) as error:
        enter(folder, tmp_path / "output")
    message = str(error.value)
    assert names in message and len(message) <= 300 and "\n" not in message, message


@pytest.mark.parametrize("damage", [damage for _, damage in REFUSED.values()], ids=REFUSED)
def test_other_doors_say_so_too_or_do_not_mind(make_model_folder, damage):
    folder = make_model_folder("qwen3")
    damage(folder)
    doors = (
        lambda: load_model(folder, torch.float32),
        lambda: load_tokenizer(folder),
        lambda: check_fits(PTQInitConfig(scheme="W4", method="rtn"), folder),
        lambda: scheme_name(folder),
        lambda: CheckpointStream(folder, folder, Scheme.parse("W4"), "cpu"),
    )
    for door in doors:
        try:
            door()
        except StageError as error:
            assert len(str(error)) <= 300 and "\n" not in str(error)


@pytest.mark.parametrize("damage", LOADS.values(), ids=LOADS)
def test_what_is_unusual_loads(make_model_folder, tmp_path, damage):
    folder = make_model_folder("qwen3")
    damage(folder)
    enter(folder, tmp_path / "output")


def test_a_long_path_leaves_room_for_cause_and_remedy(make_model_folder):
    folder = make_model_folder("llama", name="/".join(["a" * 60] * 6))
    edit(CONFIG, vocab_size="x" * 5000)(folder)
    with pytest.raises(StageError, match=r"config\.json: vocab_size must be a positive.*fetch the file anew") as error:
        folder_digest(folder)
    assert len(str(error.value)) <= 300
