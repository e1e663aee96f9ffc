import dataclasses
import json
import shutil
import subprocess
import sys

import pytest
import torch
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen3Config

from quant.grids.affine import fake_quantize
from quant.grids.scheme import Scheme
from quant.methods.registry import METHODS
from tasks.checkpoints.models import load_model, load_student, read_scheme
from tasks.checkpoints.stream import CheckpointStream
from tasks.ptq_init import PTQInitConfig, ptq_init
from tasks.runtime.stage import Context, StageError

SIZES = {
    "vocab_size": 50,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CONFIG = PTQInitConfig(scheme="W3G32", batch_size=4)


def write_base(folder, architecture="qwen3", dtype=torch.bfloat16, **saving):
    torch.manual_seed(0)
    if architecture == "qwen3":
        config = Qwen3Config(**SIZES, head_dim=32, tie_word_embeddings=True)
    else:
        config = Qwen2Config(**SIZES, tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder, **saving)
    vocabulary = {f"t{i}": i for i in range(50)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="t1", pad_token="t2", unk_token="t0")
    fast.chat_template = "{{ messages[0].content }}"
    fast.save_pretrained(folder)
    return folder


def write_calibration(folder, left=False):
    folder.mkdir()
    input_ids_NT = torch.randint(0, 50, (6, 24), generator=torch.Generator().manual_seed(1))
    mask_NT = torch.ones_like(input_ids_NT)
    for row, num in enumerate([4, 5, 4, 11, 0, 0]):  # the first batch has columns of nothing but padding
        columns = slice(0, num) if left else slice(24 - num, 24)
        mask_NT[row, columns] = 0
    save_file({"input_ids": input_ids_NT, "attention_mask": mask_NT}, folder / "tokens.safetensors")
    return folder


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return {"base": write_base(folder / "base"), "calibration": write_calibration(folder / "calibration")}


def run(folder, config, **inputs):
    """Run the stage in `folder`; its scratch outlives a failure, its output does not, as in a real run."""
    output = folder / "output"
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    (folder / "scratch").mkdir(exist_ok=True)
    metrics = ptq_init(config, Context(output, folder / "scratch"), **inputs)
    return output, metrics


def bytes_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("architecture", ["qwen3", "qwen2"])
def test_writes_a_plain_checkpoint_and_the_start_of_training(tmp_path, inputs, architecture):
    base = write_base(tmp_path / "base", architecture)
    output, metrics = run(tmp_path, CONFIG, base=base, calibration=inputs["calibration"])
    before, after = load_model(base, torch.bfloat16), load_model(output, torch.bfloat16)
    scheme = Scheme.parse("W3G32", symmetric=False)
    assert read_scheme(output) == (scheme, False)
    latents = {}
    for file in (output / "qat").glob("*.safetensors"):
        latents.update(load_file(file))
    names = {name.removesuffix(".scale") for name in latents if name.endswith(".scale")}
    assert len(names) == 3 * 7
    for name, parameter in after.named_parameters():
        linear = name.removesuffix(".weight")
        if linear in names and name.endswith(".weight"):
            weight, scale, zero = (latents[f"{linear}.{part}"] for part in ("weight", "scale", "zero"))
            assert (weight.dtype, scale.dtype, zero.dtype) == (torch.float32, torch.bfloat16, torch.float32)
            assert torch.equal(parameter, fake_quantize(weight, scale.float(), zero, scheme))
            assert not torch.equal(parameter, before.get_parameter(name))
        else:
            assert torch.equal(parameter, before.get_parameter(name))
    assert (after.lm_head.weight is after.model.embed_tokens.weight) == (architecture == "qwen3")
    student = load_student(output, "frozen")
    input_ids = torch.arange(20)[None]
    plain = load_model(output, torch.float32)
    assert torch.equal(student(input_ids=input_ids).logits, plain(input_ids=input_ids).logits)
    report = json.loads((output / "ptq_report.json").read_text())
    assert set(report) == names
    assert all(row["retries"] == 0 and row["damping"] == 0.01 and 0 < row["error"] < 1 for row in report.values())
    assert metrics["max_error"] == max(row["error"] for row in report.values())
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (output / name).read_bytes() == (base / name).read_bytes()


def test_same_bytes_again_and_from_a_sharded_base(tmp_path, inputs):
    first, _ = run(tmp_path / "a", CONFIG, **inputs)
    again, _ = run(tmp_path / "b", CONFIG, **inputs)
    assert bytes_of(first) == bytes_of(again)
    sharded = write_base(tmp_path / "sharded", max_shard_size="50KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    from_shards, _ = run(tmp_path / "c", CONFIG, base=sharded, calibration=inputs["calibration"])
    assert bytes_of(first) == bytes_of(from_shards)


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize("moment", ["before the second block is named", "between two blocks"])
def test_killed_run_resumes_with_the_same_bytes(tmp_path, inputs, monkeypatch, moment, method):
    config = PTQInitConfig(scheme="W3G32", method=method, batch_size=4)
    undisturbed, _ = run(tmp_path / "a", config, **inputs)
    store, loads = CheckpointStream.store, []

    class Killed(BaseException):
        pass

    def dying_store(self, index, block, results, further):
        if index == 1 and moment.startswith("before"):
            (self.scratch / "tmp-block-00001").mkdir()
            (self.scratch / "tmp-block-00001" / "weights.safetensors").write_bytes(b"half")
            raise Killed
        store(self, index, block, results, further)
        if index == 1:
            raise Killed

    monkeypatch.setattr(CheckpointStream, "store", dying_store)
    with pytest.raises(Killed):
        run(tmp_path / "b", config, **inputs)
    monkeypatch.setattr(CheckpointStream, "store", store)
    load = CheckpointStream.load
    monkeypatch.setattr(CheckpointStream, "load", lambda self, index: loads.append(index) or load(self, index))
    resumed, _ = run(tmp_path / "b", config, **inputs)
    to_do = [1, 2] if moment.startswith("before") else [2]
    run_through = [] if method == "gptq" else [index for index in range(3) if index not in to_do]
    assert loads == run_through + to_do  # AWQ is calibrated on the full-precision blocks, GPTQ on the stored ones
    assert bytes_of(resumed) == bytes_of(undisturbed)


@pytest.fixture(scope="module")
def killed(tmp_path_factory, inputs):
    """The undisturbed bytes, and the scratch of a run that was killed when two blocks of three were stored."""
    folder = tmp_path_factory.mktemp("killed")
    undisturbed, _ = run(folder / "a", CONFIG, **inputs)
    shutil.copytree(folder / "a" / "scratch", folder / "scratch")
    shutil.rmtree(folder / "scratch" / "block-00002")
    return bytes_of(undisturbed), folder / "scratch"


@pytest.mark.parametrize(
    ("index", "name"), [(0, "weights.safetensors"), (1, "latents.safetensors"), (1, "report.json")]
)
def test_a_damaged_block_is_set_aside_and_quantized_again(tmp_path, inputs, killed, damage, caplog, name, index):
    undisturbed, scratch = killed
    shutil.copytree(scratch, tmp_path / "scratch")
    damage(tmp_path / "scratch" / f"block-{index:05d}" / name)
    resumed, _ = run(tmp_path, CONFIG, **inputs)
    assert bytes_of(resumed) == undisturbed
    assert (tmp_path / "scratch" / f"damaged-block-{index:05d}-1").is_dir()
    assert [message.split()[1] for message in caplog.messages] == [f"block-{index:05d}"]


def test_embedded_batches_are_what_the_model_itself_computes(tmp_path, inputs):
    model = load_model(inputs["base"], torch.bfloat16)
    for left in (False, True):
        calibration = write_calibration(tmp_path / f"left-{left}", left)
        tokens = load_file(calibration / "tokens.safetensors")
        stream = CheckpointStream(inputs["base"], tmp_path, Scheme(3, 32), "cpu")
        batches = stream.batches(tokens["input_ids"], tokens["attention_mask"], 4)
        assert [batch.hidden_BTH.shape[:2] for batch in batches] == [(4, 20), (2, 24)]
        assert batches[1].mask_BT is None
        for start, batch in zip((0, 4), batches, strict=True):
            rows = slice(start, start + 4)
            span = slice(4, 24) if left and start == 0 else slice(0, batch.hidden_BTH.shape[1])
            input_ids_BT, mask_BT = tokens["input_ids"][rows, span], tokens["attention_mask"][rows, span]
            expected = model.model(input_ids=input_ids_BT, attention_mask=mask_BT, output_hidden_states=True)
            assert torch.equal(batch.hidden_BTH, expected.hidden_states[0])
            with torch.no_grad():
                after_BTH = stream.load(0)(batch.hidden_BTH, **batch.block_inputs[0])
            valid = mask_BT.bool()
            assert torch.isfinite(after_BTH[valid]).all()
            assert torch.equal(after_BTH[valid], expected.hidden_states[1][valid])


@pytest.mark.parametrize("architecture", ["qwen3", "qwen2"])
def test_awq_folds_its_scales_into_what_is_stored(tmp_path, inputs, architecture):
    base = write_base(tmp_path / "base", architecture)
    config = PTQInitConfig(scheme="W3G32", method="awq", batch_size=4)
    output, metrics = run(tmp_path, config, base=base, calibration=inputs["calibration"])
    before, after = load_model(base, torch.bfloat16), load_model(output, torch.bfloat16)
    for name, parameter in after.named_parameters():
        changed = "proj.weight" in name or "layernorm" in name  # not the biases, embeddings and the other norms
        assert torch.equal(parameter, before.get_parameter(name)) == (not changed), name
    input_ids = torch.arange(20)[None]
    plain, student = load_model(output, torch.float32), load_student(output, "frozen")
    assert torch.equal(student(input_ids=input_ids).logits, plain(input_ids=input_ids).logits)
    # The latent weights behind the scaled norms are the base model, to fp32's noise: nothing was lost to bf16.
    for file in (output / "qat").glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            if name.endswith(".weight"):
                plain.get_parameter(name).data.copy_(tensor)
    reference = before.float()(input_ids=input_ids).logits
    assert (plain(input_ids=input_ids).logits - reference).abs().max() < 1e-5 * reference.abs().max()
    report = json.loads((output / "ptq_report.json").read_text())
    assert len(report) == 21 and all(0 < row["error"] < 1 and 0 <= row["ratio"] < 1 for row in report.values())
    assert metrics["max_error"] == max(row["error"] for row in report.values())


def test_rtn_needs_no_calibration_and_errs_more(tmp_path, inputs):
    output, _ = run(tmp_path, PTQInitConfig(scheme="W3G32", method="rtn", symmetric=True), base=inputs["base"])
    base = load_file(inputs["base"] / "model.safetensors")
    for file in (output / "qat").glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            if name.endswith(".weight"):
                assert torch.equal(tensor, base[name].float())
    report = json.loads((output / "ptq_report.json").read_text())
    assert len(report) == 21


def test_fp32_base_is_calibrated_in_fp32(tmp_path, inputs):
    base = write_base(tmp_path / "base", dtype=torch.float32)
    output, _ = run(tmp_path, CONFIG, base=base, calibration=inputs["calibration"])
    with safe_open(output / "model-00002-of-00004.safetensors", framework="pt") as file:
        assert file.get_tensor("model.layers.0.mlp.up_proj.weight").dtype == torch.bfloat16
        assert file.get_tensor("model.layers.0.input_layernorm.weight").dtype == torch.float32
    assert load_model(output, torch.float32).config.dtype == torch.float32


def test_a_scheme_that_does_not_fit_the_model_is_refused_before_any_work(tmp_path, inputs):
    with pytest.raises(StageError, match="Group sizes that work"):
        run(tmp_path, CONFIG.model_copy(update={"scheme": "W3G128"}), **inputs)
    assert not list((tmp_path / "scratch").iterdir())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "gptqq"}, "did you mean 'gptq'"),
        ({"scheme": "W3GX"}, "unknown scheme"),
        ({"scheme": "W3G64", "gptq": {"static_groups": False}}, "static_groups=True"),
        ({"scheme": "W1"}, "bits must be from 2 to 8"),
        ({"scheme": "W3G0"}, "group_size must be positive"),
        ({"scheme": "W4A4", "method": "awq"}, "awq quantizes weights only"),
        ({"scheme": "W3", "method": "flatquant"}, "does not quantize them"),
        ({"scale_rule": "full_range"}, "symmetric=True"),
        ({"gptq": {"damping": -1.0}}, "damping must lie"),
        ({"gptq": {"num_ratios": 20}}, "num_ratios"),
        ({"act_order": False}, "act_order"),
        ({"awq": {"clip": False}}, "awq holds options of another method than 'gptq'"),
        ({"method": "rtn", "gptq": {}}, "gptq holds options of another method than 'rtn'"),
    ],
)
def test_options_that_a_method_lacks_are_refused(fields, message):
    with pytest.raises(ValidationError, match=message):
        PTQInitConfig.model_validate(fields)


SCHEMES = {"flatquant": "W4A4KV4"}
NUMBERS = [
    (name, field.name)
    for name, method in METHODS.items()
    for field in dataclasses.fields(method.options)
    if type(field.default) in (int, float)
]


@pytest.mark.parametrize(("method", "field"), NUMBERS)
@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), -float("inf"), 1e300, 10**40])
def test_every_number_of_every_method_has_bounds(method, field, value):
    with pytest.raises(ValidationError, match=field):
        PTQInitConfig.model_validate({"scheme": SCHEMES.get(method, "W3"), "method": method, method: {field: value}})


def test_the_stage_and_the_table_of_methods_load_neither_torch_nor_transformers():
    heavy = {"torch", "transformers", "numpy", "huggingface_hub"}
    code = f"import sys, tasks.ptq_init, tasks.base_model; print(sorted({heavy} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


def test_every_method_with_options_has_a_section():
    for name, method in METHODS.items():
        if dataclasses.fields(method.options):
            config = PTQInitConfig.model_validate({"scheme": SCHEMES.get(name, "W3"), "method": name, name: {}})
            assert config.parsed_method() == (method, method.options())


def test_bad_calibration_is_refused(tmp_path, inputs):
    with pytest.raises(StageError, match="needs calibration data"):
        run(tmp_path, CONFIG, base=inputs["base"])
    for name, input_ids, mask, message in (
        ("foreign", torch.full((2, 4), 50), torch.ones(2, 4), "vocabulary"),
        ("empty row", torch.zeros(2, 4), torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]]), "empty sequence"),
        ("nothing", torch.zeros(0, 4), torch.zeros(0, 4), "empty"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        save_file({"input_ids": input_ids.long(), "attention_mask": mask.long()}, folder / "tokens.safetensors")
        with pytest.raises(StageError, match=message):
            run(tmp_path, CONFIG, base=inputs["base"], calibration=folder)
