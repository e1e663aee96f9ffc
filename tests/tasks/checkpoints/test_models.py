"""Model folders: clear refusals, and checkpoints that come back bit for bit."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from quant.grids.scheme import Scheme
from quant.student.linear import linear_states, prepare, quantized_linears
from tasks.checkpoints.models import (
    check_model_folder,
    load_model,
    load_student,
    load_tokenizer,
    read_scheme,
    save_student,
)
from tasks.runtime.stage import StageError

KINDS = ["qwen2", "qwen3", "llama"]
SCHEME = Scheme.parse("W3G32", symmetric=False)
INPUT_IDS = torch.arange(5, 45).reshape(2, 20)


def make_student(source: Path, scale_mode: str = "frozen") -> torch.nn.Module:
    """A student whose latents have moved off the grid's origin, as training moves them."""
    student = prepare(load_model(source, torch.float32), SCHEME, None, scale_mode)
    torch.manual_seed(1)
    with torch.no_grad():
        for _, linear in quantized_linears(student):
            linear.weight.add_(torch.randn_like(linear.weight) * 0.01)
    return student


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=INPUT_IDS).logits


def digests(folder: Path) -> dict[str, str]:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.mark.parametrize("scale_mode", ["frozen", "recomputed", "learned"])
@pytest.mark.parametrize("kind", KINDS)
def test_student_round_trip_is_bit_equal(make_model_folder, tmp_path, kind, scale_mode):
    source = make_model_folder(kind)
    student = make_student(source, scale_mode)
    save_student(student, source, tmp_path / "out")
    again = load_student(tmp_path / "out", scale_mode)
    torch.testing.assert_close(logits(again), logits(student), atol=0, rtol=0)
    for (name, first), (_, second) in zip(quantized_linears(student), quantized_linears(again), strict=True):
        torch.testing.assert_close(first.weight, second.weight, atol=0, rtol=0, msg=name)
    assert not torch.equal(logits(student), logits(load_model(source, torch.float32)))


@pytest.mark.parametrize("kind", KINDS)
def test_any_tool_loads_what_the_student_computes(make_model_folder, tmp_path, kind):
    source = make_model_folder(kind)
    student = make_student(source)
    save_student(student, source, tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(logits(plain), logits(student), atol=0, rtol=0)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert plain.dtype == torch.bfloat16
    in_bf16 = prepare(load_model(source, torch.bfloat16), SCHEME, linear_states(student), "frozen")
    torch.testing.assert_close(logits(plain), logits(in_bf16), atol=0, rtol=0)


def test_checkpoint_format(make_model_folder, tmp_path):
    source = make_model_folder("qwen3", dtype=torch.float32)
    save_student(make_student(source), source, tmp_path / "out")
    plain = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in plain.values()} == {torch.bfloat16}
    assert "model.embed_tokens.weight" in plain and "lm_head.weight" not in plain
    latents = load_file(tmp_path / "out" / "qat" / "latent.safetensors")
    name = "model.layers.1.mlp.down_proj"
    assert latents[f"{name}.weight"].dtype == torch.float32 and latents[f"{name}.weight"].shape == (64, 96)
    assert latents[f"{name}.scale"].dtype == torch.bfloat16 and latents[f"{name}.scale"].shape == (64, 3)
    assert latents[f"{name}.zero"].shape == (64, 3)
    assert read_scheme(tmp_path / "out") == (SCHEME, False)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    for file in ("chat_template.jinja", "tokenizer.json", "generation_config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (source / file).read_bytes()


def test_dequantized_weights_follow_the_written_grid(make_model_folder, tmp_path):
    source = make_model_folder("llama")
    save_student(make_student(source), source, tmp_path / "out")
    plain = load_file(tmp_path / "out" / "model.safetensors")
    latents = load_file(tmp_path / "out" / "qat" / "latent.safetensors")
    name = "model.layers.0.self_attn.v_proj"
    weight, scale, zero = (latents[f"{name}.{part}"] for part in ("weight", "scale", "zero"))
    for row, column in [(0, 0), (3, 31), (3, 32), (31, 63)]:
        s, z = float(scale[row, column // 32]), float(zero[row, column // 32])
        code = min(max(round(float(weight[row, column]) / s) + z, 0), 7)
        expected = torch.tensor(s * (code - z)).to(torch.bfloat16)
        assert plain[f"{name}.weight"][row, column] == expected


def test_bytes_are_deterministic_whatever_was_saved_before(make_model_folder, tmp_path):
    source = make_model_folder("qwen2")
    save_student(make_student(source), source, tmp_path / "one")
    save_student(load_student(tmp_path / "one", "frozen"), tmp_path / "one", tmp_path / "two")
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


def test_shards_and_index(make_model_folder, tmp_path):
    source = make_model_folder("qwen3")
    student = make_student(source)
    save_student(student, source, tmp_path / "out", max_shard_bytes=40_000)
    shards = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    for name, shard in index["weight_map"].items():
        assert name in load_file(tmp_path / "out" / shard)
    values = sum(tensor.numel() for shard in shards for tensor in load_file(tmp_path / "out" / shard).values())
    assert index["metadata"] == {"total_parameters": values, "total_size": 2 * values}
    assert len(list((tmp_path / "out" / "qat").glob("latent-*.safetensors"))) > 2
    torch.testing.assert_close(logits(load_student(tmp_path / "out", "frozen")), logits(student), atol=0, rtol=0)


def test_trained_parameters_outside_the_linears_keep_their_fp32_values(make_model_folder, tmp_path):
    source = make_model_folder("qwen2")
    student = make_student(source)
    with torch.no_grad():
        student.model.norm.weight.add_(1e-4)
        student.model.layers[0].self_attn.q_proj.bias.add_(1e-5)
    save_student(student, source, tmp_path / "out")
    latents = load_file(tmp_path / "out" / "qat" / "latent.safetensors")
    others = {name for name in latents if not name.endswith((".scale", ".zero", "_proj.weight"))}
    assert others == {"model.norm.weight", "model.layers.0.self_attn.q_proj.bias"}
    torch.testing.assert_close(logits(load_student(tmp_path / "out", "frozen")), logits(student), atol=0, rtol=0)


def test_model_without_quantized_linears_gives_a_plain_checkpoint(make_model_folder, tmp_path):
    source = make_model_folder("llama")
    model = load_model(source, torch.bfloat16)
    save_student(model, source, tmp_path / "out")
    assert not (tmp_path / "out" / "qat").exists()
    torch.testing.assert_close(logits(load_model(tmp_path / "out", torch.bfloat16)), logits(model), atol=0, rtol=0)
    with pytest.raises(StageError, match=r"no QAT checkpoint.*ptq_init"):
        load_student(tmp_path / "out", "frozen")


def test_two_schemes_in_one_checkpoint_are_refused(make_model_folder, tmp_path):
    source = make_model_folder("llama")
    student = make_student(source)
    next(quantized_linears(student))[1].scheme = Scheme.parse("W4G32", symmetric=False)
    with pytest.raises(ValueError, match="one scheme"):
        save_student(student, source, tmp_path / "out")


def edit_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def rename_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def lose_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"a": torch.zeros(1)}, folder / "model-00001-of-00002.safetensors")


def truncate(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-100])


def lfs_pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")


REFUSALS = {
    "no config": (lambda f: (f / "config.json").unlink(), r"lacks config\.json"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "no valid JSON"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"no weights: model\.safetensors"),
    "pickled": (rename_weights, r"pickled weights.*pytorch_model\.bin.*convert"),
    "shard missing": (lose_shard, r"model-00002-of-00002\.safetensors"),
    "truncated": (truncate, "damaged"),
    "lfs pointer": (lfs_pointer, "git-lfs"),
    "architecture": (
        lambda f: edit_config(f, architectures=["GPT2LMHeadModel"]),
        "GPT2LMHeadModel is not supported.*Qwen2ForCausalLM, Qwen3ForCausalLM, LlamaForCausalLM",
    ),
    "quantized": (lambda f: edit_config(f, quantization_config={"quant_method": "gptq"}), "already quantized.*gptq"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer"),
    "wrong tokenizer": (lambda f: edit_config(f, vocab_size=200), "261 tokens but the model only 200"),
}


@pytest.mark.parametrize("damage, message", REFUSALS.values(), ids=REFUSALS)
def test_bad_folders_are_refused_with_a_remedy(make_model_folder, damage, message):
    folder = make_model_folder("llama")
    check_model_folder(folder)
    damage(folder)
    with pytest.raises(StageError, match=message):
        check_model_folder(folder)


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(StageError, match=r"no model folder at .*absent"):
        check_model_folder(tmp_path / "absent")


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_weights_that_do_not_fit_are_refused_not_randomised(make_model_folder, change):
    folder = make_model_folder("llama")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    if change == "missing":
        del tensors[name]
    elif change == "unexpected":
        tensors["model.layers.7.mlp.up_proj.weight"] = tensors[name].clone()
    else:
        tensors[name] = tensors[name][:-1].contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StageError, match="do not fit its config"):
        load_model(folder, torch.float32)


def test_tokenizer_without_padding_pads_with_eos(make_model_folder):
    tokenizer = load_tokenizer(make_model_folder("llama"))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 4
