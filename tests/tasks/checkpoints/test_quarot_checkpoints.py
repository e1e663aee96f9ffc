"""QuaRot through the stage: what is written, how training goes on from it, and what a kill or a wrong size does."""

import gc
import hashlib
import json
import shutil
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

from quant.methods.options import QuaRotOptions
from quant.student.linear import quantized_linears
from quant.student.sites import quantizers, quantizers_disabled
from tasks.checkpoints.models import load_model, load_student, save_student
from tasks.checkpoints.stream import CheckpointStream
from tasks.ptq_init import PTQInitConfig, check_fits, ptq_init
from tasks.runtime.stage import Context, StageError

KINDS = ["qwen2", "qwen3", "llama"]
CONFIG = PTQInitConfig(scheme="W4A4KV4", symmetric=True, method="quarot", batch_size=4)
INPUT_IDS = torch.randint(5, 300, (3, 24), generator=torch.Generator().manual_seed(1))


def run(folder, config, base, with_calibration=True):
    """Run the stage in `folder`; its scratch outlives a failure, its output does not, as in a real run."""
    output, calibration = folder / "output", folder / "calibration"
    shutil.rmtree(output, ignore_errors=True)
    for new in (output, calibration, folder / "scratch"):
        new.mkdir(parents=True, exist_ok=True)
    input_ids_NT = torch.randint(0, 300, (6, 24), generator=torch.Generator().manual_seed(2))
    tokens = {"input_ids": input_ids_NT, "attention_mask": torch.ones_like(input_ids_NT)}
    save_file(tokens, calibration / "tokens.safetensors")
    context = Context(output, folder / "scratch")
    ptq_init(config, context, base=base, **({"calibration": calibration} if with_calibration else {}))
    return output


@torch.no_grad()
def logits(model, input_ids=INPUT_IDS):
    return model(input_ids=input_ids).logits.double()


def digests(folder):
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.mark.parametrize("kind", KINDS)
def test_at_many_bits_the_checkpoint_computes_as_the_base_does(make_model_folder, tmp_path, kind):
    base = make_model_folder(kind, dtype=torch.float32)
    config = CONFIG.model_copy(update={"scheme": "W8A8KV8", "quarot": QuaRotOptions(activation_clip=1, kv_clip=1)})
    output = run(tmp_path, config, base)
    expected, found = logits(load_model(base, torch.float32)), logits(load_model(output, torch.float32))
    assert 0 < (found - expected).square().mean() < 1e-3 * expected.square().mean()
    # but in another basis, with an output embedding of its own and our name for what works online
    before, after = load_model(base, torch.float32), load_model(output, torch.float32)
    assert not torch.allclose(before.model.embed_tokens.weight, after.model.embed_tokens.weight, atol=1e-3)
    content = json.loads((output / "config.json").read_text())
    assert content["tie_word_embeddings"] is False and content["quantization_config"]["quant_method"] == "reasoning_qat"
    assert after.lm_head.weight is not after.model.embed_tokens.weight
    assert torch.equal(after.model.norm.weight, torch.ones(64))


@pytest.mark.parametrize(("kind", "weights", "scale_mode"), [(k, "gptq", "frozen") for k in KINDS] + [
    ("qwen3", "rtn", "recomputed")
])  # fmt: skip
def test_training_goes_on_from_it_and_is_saved_as_it_computes(make_model_folder, tmp_path, kind, weights, scale_mode):
    base = make_model_folder(kind)
    config = CONFIG.model_copy(update={"quarot": QuaRotOptions(weights=weights)})
    output = run(tmp_path, config, base, with_calibration=weights == "gptq")
    student = load_student(output, scale_mode)
    torch.testing.assert_close(logits(student), logits(load_model(output, torch.float32)), atol=0, rtol=0)

    teacher = logits(load_model(base, torch.float32)).float()
    before = {name: module.weight.detach().clone() for name, module in quantized_linears(student)}
    optimizer = torch.optim.Adam([module.weight for _, module in quantized_linears(student)], lr=1e-4)
    losses = []
    for _ in range(8):
        log_probs = student(input_ids=INPUT_IDS).logits.log_softmax(-1)
        loss = torch.nn.functional.kl_div(log_probs, teacher.log_softmax(-1), log_target=True, reduction="batchmean")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert all(not torch.equal(module.weight, before[name]) for name, module in quantized_linears(student))

    save_student(student, output, tmp_path / "trained")
    trained = logits(student)
    again, plain = load_student(tmp_path / "trained", scale_mode), load_model(tmp_path / "trained", torch.float32)
    torch.testing.assert_close(logits(again), trained, atol=0, rtol=0)
    torch.testing.assert_close(logits(plain), trained, atol=0, rtol=0)
    # In bf16 activations are rounded before they are quantized, which moves codes; without codes only rounding is left.
    in_bf16 = load_model(tmp_path / "trained", torch.bfloat16)
    with quantizers_disabled(in_bf16), quantizers_disabled(plain):
        noise = (logits(in_bf16) - logits(plain)).square().mean() / logits(plain).square().mean()
    assert noise < 1e-3


def test_every_site_has_its_transform_and_clip(make_model_folder, tmp_path):
    model = load_model(run(tmp_path, CONFIG, make_model_folder("qwen3")), torch.bfloat16)
    found = dict(quantizers(model))
    assert len(found) == 2 * 5 and all(quantizer.enabled for quantizer in found.values())
    layer = "model.layers.1"
    inputs = {
        site: found[f"{layer}.{site}.input_quantizer"]
        for site in ("self_attn", "self_attn.o_proj", "mlp", "mlp.down_proj")
    }
    assert [site for site, quantizer in inputs.items() if quantizer.transform is not None] == [
        "self_attn.o_proj",
        "mlp.down_proj",
    ]
    assert all(
        quantizer.grid.bits == 4 and quantizer.clip().sub(0.9).abs().max() < 1e-6 for quantizer in inputs.values()
    )
    kv = found[f"{layer}.self_attn.kv_quantizer"]
    assert kv.key_transform.right.shape == (32, 32) and kv.key_transform.left is None
    assert kv.key_clip().sub(0.95).abs().max() < 1e-6 and kv.value_clip().sub(0.95).abs().max() < 1e-6


@pytest.mark.parametrize("weights", ["gptq", "rtn"])
def test_killed_run_resumes_with_the_same_bytes(make_model_folder, tmp_path, monkeypatch, weights):
    base, calibrated = make_model_folder("qwen2"), weights == "gptq"
    config = CONFIG.model_copy(update={"quarot": QuaRotOptions(weights=weights)})
    undisturbed = run(tmp_path / "a", config, base, calibrated)
    store = CheckpointStream.store

    class Killed(BaseException):
        pass

    def dying_store(self, index, block, results, further):
        store(self, index, block, results, further)
        raise Killed

    monkeypatch.setattr(CheckpointStream, "store", dying_store)
    with pytest.raises(Killed):
        run(tmp_path / "b", config, base, calibrated)
    monkeypatch.setattr(CheckpointStream, "store", store)
    assert digests(run(tmp_path / "b", config, base, calibrated)) == digests(undisturbed)


def test_one_block_is_in_memory_at_a_time(make_model_folder, tmp_path, monkeypatch):
    load, alive, most = CheckpointStream.load, [], []

    def counting_load(self, index):
        gc.collect()
        alive[:] = [ref for ref in alive if ref() is not None]
        most.append(len(alive))
        block = load(self, index)
        alive.append(weakref.ref(block))
        return block

    monkeypatch.setattr(CheckpointStream, "load", counting_load)
    run(tmp_path, CONFIG, make_model_folder("qwen3"))
    assert most == [0, 0]


def test_another_seed_is_another_rotation_of_as_good_a_model(make_model_folder, tmp_path):
    base, embeddings = make_model_folder("llama"), []
    for seed in (0, 1):
        config = CONFIG.model_copy(update={"quarot": QuaRotOptions(seed=seed)})
        output = run(tmp_path / str(seed), config, base)
        embeddings.append(load_file(output / "model-00001-of-00003.safetensors")["model.embed_tokens.weight"].float())
    assert not torch.equal(*embeddings)
    torch.testing.assert_close(embeddings[0].norm(dim=1), embeddings[1].norm(dim=1), rtol=0.01, atol=0)


def test_sizes_without_hadamard_matrix_are_refused_before_any_work(make_model_folder, tmp_path):
    base = make_model_folder("llama")
    content = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(content | {"intermediate_size": 1022}))
    with pytest.raises(StageError, match="no Hadamard matrix of order 1022"):
        check_fits(CONFIG, base)
    with pytest.raises(StageError, match=r"do not fit its config\.json"):
        run(tmp_path, CONFIG, base)
    assert not list((tmp_path / "scratch").iterdir())
    check_fits(CONFIG.model_copy(update={"method": "rtn"}), base)
