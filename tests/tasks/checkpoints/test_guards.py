"""Every checkpoint is looked at where it enters and where it leaves: no NaN, no lost quantizers, no other head."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quant.grids.scheme import Scheme
from quant.student.linear import prepare, quantized_linears
from tasks.base_model import BaseModelConfig, base_model, source_digest
from tasks.checkpoints.folders import read_model_folder, scheme_name
from tasks.checkpoints.models import load_model, load_student, save_student
from tasks.checkpoints.tensors import is_finite, save_tensors
from tasks.ptq_init import PTQInitConfig, ptq_init
from tasks.runtime.stage import Context, StageError

INPUT_IDS = torch.arange(5, 45).reshape(2, 20)
METHODS = {
    "rtn": {"scheme": "W4"},
    "gptq": {"scheme": "W4"},
    "awq": {"scheme": "W4"},
    "quarot": {"scheme": "W4A8KV8"},
    "flatquant": {"scheme": "W4A8KV8", "flatquant": {"epochs": 1}},
}
PLACES = (
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.q_proj.bias",
    "model.layers.0.input_layernorm.weight",
    "model.layers.1.mlp.down_proj.weight",
    "model.norm.weight",
    "lm_head.weight",
)


@pytest.fixture
def calibration(tmp_path) -> Path:
    folder = tmp_path / "calibration"
    folder.mkdir()
    ids = torch.randint(5, 200, (4, 16), generator=torch.Generator().manual_seed(0))
    save_file({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, folder / "tokens.safetensors")
    return folder


@pytest.fixture
def run(tmp_path, calibration):
    """Runs a stage in new folders; gives its output."""

    def run(stage, config, **inputs) -> Path:
        output, scratch = (tmp_path / f"{kind}-{len(list(tmp_path.iterdir()))}" for kind in ("output", "scratch"))
        output.mkdir()
        scratch.mkdir()
        stage(config, Context(output, scratch), **inputs)
        return output

    return run


def put(folder: Path, **tensors: torch.Tensor) -> None:
    content = load_file(folder / "model.safetensors")
    save_file(content | tensors, folder / "model.safetensors", metadata={"format": "pt"})


def spoil(folder: Path, name: str, value: float) -> None:
    tensor = load_file(folder / "model.safetensors")[name].clone()
    tensor.view(-1)[3] = value
    put(folder, **{name: tensor})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", PLACES)
def test_a_tensor_that_is_not_finite_is_named_at_every_entrance(make_model_folder, run, name, value):
    folder = make_model_folder("qwen2")
    spoil(folder, name, value)
    for enter in (
        lambda: run(base_model, BaseModelConfig(model=str(folder))),
        lambda: run(ptq_init, PTQInitConfig(scheme="W4", method="rtn"), base=folder),
        lambda: load_model(folder, torch.bfloat16),
        lambda: load_model(folder, torch.float32),
    ):
        with pytest.raises(StageError, match=f"{name} holds NaN or infinities") as error:
            enter()
        assert len(str(error.value)) <= 300


@pytest.mark.parametrize("method", METHODS)
def test_no_method_takes_what_is_not_finite(make_model_folder, run, calibration, method):
    folder = make_model_folder("qwen3")
    spoil(folder, "model.layers.1.mlp.down_proj.weight", float("nan"))
    with pytest.raises(StageError, match=r"layers\.1\.mlp\.down_proj\.weight holds NaN"):
        run(ptq_init, PTQInitConfig(method=method, **METHODS[method]), base=folder, calibration=calibration)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_finite_is_what_isfinite_says(dtype):
    for number, expected in ((1.0, True), (torch.finfo(dtype).max, True), (float("nan"), False), (float("inf"), False)):
        tensor = torch.full((100, 100), number, dtype=dtype)
        assert is_finite(tensor) == expected
        tensor[1:] = 0
        assert is_finite(tensor) == expected
    opposite = torch.tensor([float("inf"), -float("inf"), 1.0], dtype=dtype)
    assert not is_finite(opposite)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3.4e38])
def test_a_student_that_bfloat16_cannot_hold_is_not_saved(make_model_folder, tmp_path, value):
    source = make_model_folder("qwen2")
    student = prepare(load_model(source, torch.float32), Scheme.parse("W4"), None, "frozen")
    with torch.no_grad():
        student.model.norm.weight[0] = value
    with pytest.raises(StageError, match=r"model\.norm\.weight is NaN or too large for bfloat16.*learning rate"):
        save_student(student, source, tmp_path / "out")


def test_latents_that_are_not_finite_are_neither_saved_nor_loaded(make_model_folder, tmp_path):
    source = make_model_folder("llama")
    student = prepare(load_model(source, torch.float32), Scheme.parse("W4"), None, "frozen")
    save_student(student, source, tmp_path / "out")
    latents = load_file(tmp_path / "out" / "qat" / "latent.safetensors")
    name, linear = next(quantized_linears(student))
    latents[f"{name}.weight"][0, 0] = float("nan")
    save_file(latents, tmp_path / "out" / "qat" / "latent.safetensors")
    with pytest.raises(StageError, match=f"{name}.weight holds NaN"):
        load_student(tmp_path / "out", "frozen")
    with torch.no_grad():
        linear.weight[0, 0] = float("nan")
    with pytest.raises(StageError, match=f"{name}.weight is NaN"):
        save_student(student, source, tmp_path / "again")


def test_a_full_disk_is_the_system_s_error(monkeypatch, tmp_path):
    with pytest.raises(OSError, match="os error 2") as error:
        save_tensors({"a": torch.zeros(1)}, tmp_path / "absent" / "file.safetensors")
    assert error.value.errno == 2


@pytest.mark.parametrize("method", ["gptq", "awq", "flatquant"])
def test_float16_that_overflows_is_told_as_that(make_model_folder, run, calibration, method):
    folder = make_model_folder("llama", dtype=torch.float16)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    put(folder, **{name: tensors[name] * 3e5, name.replace("up", "gate"): tensors[name.replace("up", "gate")] * 3e5})
    config = PTQInitConfig(method=method, **METHODS[method])
    with pytest.raises(StageError, match=r"activations overflow in float16; use bfloat16") as error:
        run(ptq_init, config, base=folder, calibration=calibration)
    assert len(str(error.value)) <= 300
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"dtype": "bfloat16"}))
    run(ptq_init, config, base=folder, calibration=calibration)


@pytest.mark.parametrize(
    "stored, said, right",
    [
        (torch.bfloat16, "float16", "bfloat16"),
        (torch.float32, "float16", "float32"),
        (torch.float16, "float16", "float16"),
        (torch.float16, "bfloat16", "bfloat16"),
        (torch.float32, "bfloat16", "bfloat16"),
        (torch.bfloat16, None, "bfloat16"),
        (torch.float32, "auto", "float32"),
    ],
)
def test_float16_is_believed_only_where_the_weights_are_float16(make_model_folder, stored, said, right):
    folder = make_model_folder("llama", dtype=stored)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"dtype": said}))
    assert read_model_folder(folder).dtype == right


def test_weights_too_large_for_a_dtype_are_told_when_they_are_loaded_in_it(make_model_folder):
    folder = make_model_folder("llama", dtype=torch.bfloat16)
    spoil(folder, "model.norm.weight", 1e30)
    with pytest.raises(StageError, match=r"model\.norm\.weight overflows in float16; use bfloat16"):
        load_model(folder, torch.float16)


@pytest.mark.parametrize("scheme, method", [("W4", "rtn"), ("W4A4KV4", "quarot"), ("W4A4KV4", "flatquant")])
def test_our_own_quantized_checkpoint_is_no_base(make_model_folder, run, calibration, scheme, method):
    options = {"flatquant": {"epochs": 1}} if method == "flatquant" else {}
    config = PTQInitConfig(scheme=scheme, method=method, **options)
    quantized = run(ptq_init, config, base=make_model_folder("llama"), calibration=calibration)
    assert scheme_name(quantized) == scheme
    for enter in (source_digest, lambda base: run(base_model, base)):
        with pytest.raises(StageError, match=rf"quantized checkpoint of ours \({scheme}\).*checkpoint=DIGEST") as error:
            enter(BaseModelConfig(model=str(quantized)))
        assert len(str(error.value)) <= 300
    with pytest.raises(StageError, match="quantized checkpoint of ours"):
        run(ptq_init, config, base=quantized, calibration=calibration)


@pytest.mark.parametrize("dtype, name", [(torch.bfloat16, "BF16"), (torch.float32, "FP32"), (torch.float16, "FP16")])
def test_the_scheme_of_a_plain_checkpoint_is_its_type(make_model_folder, dtype, name):
    assert scheme_name(make_model_folder("llama", dtype=dtype)) == name


def test_what_is_no_checkpoint_has_no_scheme(calibration):
    with pytest.raises(StageError, match=r"no model.*digest of a checkpoint"):
        scheme_name(calibration)


@pytest.mark.parametrize("method", METHODS)
def test_a_head_of_its_own_is_the_model_s_whatever_config_says(make_model_folder, run, calibration, method):
    base = make_model_folder("qwen3")  # tied
    embedding_VH = load_file(base / "model.safetensors")["model.embed_tokens.weight"] * 20
    put(base, **{"model.embed_tokens.weight": embedding_VH, "lm_head.weight": embedding_VH.roll(1, 0).contiguous()})
    entered = run(base_model, BaseModelConfig(model=str(base)))
    assert json.loads((entered / "config.json").read_text())["tie_word_embeddings"] is False
    eight_bits = {"scheme": METHODS[method]["scheme"].replace("W4", "W8")}
    config = PTQInitConfig(method=method, **(METHODS[method] | eight_bits))
    for folder in (base, entered):
        output = run(ptq_init, config, base=folder, calibration=calibration)
        assert json.loads((output / "config.json").read_text())["tie_word_embeddings"] is False
        with torch.no_grad():
            before, after = (load_model(f, torch.float32)(INPUT_IDS).logits.log_softmax(-1) for f in (base, output))
        assert float((before.exp() * (before - after)).sum(-1).mean()) < 0.01


def test_a_head_stored_beside_the_same_embeddings_is_still_tied(make_model_folder, run):
    base = make_model_folder("qwen3")
    put(base, **{"lm_head.weight": load_file(base / "model.safetensors")["model.embed_tokens.weight"].clone()})
    entered = run(base_model, BaseModelConfig(model=str(base)))
    assert json.loads((entered / "config.json").read_text())["tie_word_embeddings"] is True
    assert (entered / "config.json").read_bytes() == (base / "config.json").read_bytes()


def test_a_saved_student_says_whether_its_head_is_tied(make_model_folder, tmp_path):
    source = make_model_folder("qwen3")
    embedding_VH = load_file(source / "model.safetensors")["model.embed_tokens.weight"]
    put(source, **{"lm_head.weight": embedding_VH.roll(1, 0).contiguous()})
    model = load_model(source, torch.float32)
    save_student(model, source, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    with torch.no_grad():
        again = load_model(tmp_path / "out", torch.float32)(INPUT_IDS).logits
        assert torch.equal(again, model(INPUT_IDS).logits)
