"""FlatQuant through the stage: what is written, how training goes on from it, and what a kill does."""

import hashlib
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from quant.methods.options import FlatQuantOptions
from quant.student.linear import quantized_linears
from quant.student.sites import learned_parameters, quantizers_disabled
from tasks.checkpoints.models import load_model, load_student, read_scheme, save_student
from tasks.checkpoints.stream import CheckpointStream
from tasks.kd_train import KDTrainConfig, kd_train
from tasks.ptq_init import PTQInitConfig, check_fits, ptq_init
from tasks.runtime.stage import Context, StageError
from tasks.training.config import StudentConfig
from tasks.training.student import select_trainable, student_optimizers

KINDS = ["qwen2", "qwen3", "llama"]
CONFIG = PTQInitConfig(
    scheme="W4A4KV4", symmetric=True, method="flatquant", flatquant=FlatQuantOptions(epochs=2), batch_size=2
)
INPUT_IDS = torch.randint(5, 300, (3, 24), generator=torch.Generator().manual_seed(1))
MANY_INPUT_IDS = torch.randint(5, 300, (64, 24), generator=torch.Generator().manual_seed(3))


def run(folder, base, config=CONFIG):
    """Run the stage in `folder`; its scratch outlives a failure, its output does not, as in a real run."""
    output, calibration = folder / "output", folder / "calibration"
    shutil.rmtree(output, ignore_errors=True)
    for new in (output, calibration, folder / "scratch"):
        new.mkdir(parents=True, exist_ok=True)
    input_ids_NT = torch.randint(0, 300, (6, 24), generator=torch.Generator().manual_seed(2))
    mask_NT = torch.ones_like(input_ids_NT)
    mask_NT[0, 20:] = 0
    save_file({"input_ids": input_ids_NT, "attention_mask": mask_NT}, calibration / "tokens.safetensors")
    metrics = ptq_init(config, Context(output, folder / "scratch"), base=base, calibration=calibration)
    return output, metrics


@torch.no_grad()
def logits(model, input_ids=INPUT_IDS):
    return model(input_ids=input_ids).logits.double()


def digests(folder):
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def mean_square(x):
    return float(x.square().mean())


@pytest.mark.parametrize("kind", KINDS)
def test_training_goes_on_from_it_and_is_saved_as_it_computes(make_model_folder, tmp_path, kind):
    base = make_model_folder(kind)
    output, metrics = run(tmp_path, base)
    assert metrics["max_retries"] == 0
    scheme, learned = read_scheme(output)
    assert (scheme.name, learned) == ("W4A4KV4", True)
    student = load_student(output, "recomputed")
    # As before FlatQuant: what it learned is beside the weights, norms and biases, not in them.
    original = load_model(base, torch.float32)
    for name, parameter in original.named_parameters():
        assert torch.equal(student.get_parameter(name), parameter)

    config = StudentConfig(steps=1, learning_rate=1e-4, transform_learning_rate=1e-3, clip_learning_rate=1e-2)
    select_trainable(student, config)
    (optimizer,) = student_optimizers(student, config)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-4, 1e-3, 1e-2]
    before = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}
    teacher, losses = logits(original).float(), []
    for _ in range(8):
        loss = (student(input_ids=INPUT_IDS).logits - teacher).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    moved = {name for name, parameter in student.named_parameters() if not torch.equal(parameter, before[name])}
    trained = {f"{name}.weight" for name, _ in quantized_linears(student)}
    learnable = {id(p) for parameters in learned_parameters(student) for p in parameters}
    trained |= {name for name, parameter in student.named_parameters() if id(parameter) in learnable}
    assert moved == trained and len(trained) == 2 * (7 + 4 + 5 + 3 + 6 + 7)

    save_student(student, output, tmp_path / "trained")
    again = load_student(tmp_path / "trained", "recomputed")
    assert torch.equal(logits(again), logits(student))
    plain = load_model(tmp_path / "trained", torch.float32)
    with quantizers_disabled(student), quantizers_disabled(plain):
        difference = logits(plain) - logits(student)
    assert mean_square(difference) < 1e-5 * mean_square(logits(student)), "norms and biases rounded to bf16"
    # Which codes of 4 bits that rounding changes is a matter of chance, so this looks at many tokens.
    found, expected, unquantized = (logits(model, MANY_INPUT_IDS) for model in (plain, student, original))
    assert mean_square(found - expected) < 0.5 * mean_square(expected - unquantized)


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_where_bfloat16_holds_what_is_folded_the_checkpoint_is_the_student_to_the_bit(
    make_model_folder, tmp_path, kind
):
    """With the quantizers on: norms of one times powers of two are exact."""
    output, _ = run(tmp_path, make_model_folder(kind))
    student = load_student(output, "recomputed")
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if name.endswith("layernorm.weight"):
                parameter.fill_(1)
            if name.endswith("input_quantizer.transform.diagonal"):
                parameter.copy_(torch.exp2(parameter.log2().round()))
    save_student(student, output, tmp_path / "trained")
    plain = load_model(tmp_path / "trained", torch.float32)
    assert torch.equal(logits(plain), logits(student))
    assert not any(name.endswith("diagonal") for name in load_file(tmp_path / "trained/qat/online.safetensors"))


def test_killed_run_resumes_with_the_same_bytes_wherever_activations_wait(make_model_folder, tmp_path, monkeypatch):
    base = make_model_folder("qwen2")
    undisturbed, _ = run(tmp_path / "a", base)
    store = CheckpointStream.store

    class Killed(BaseException):
        pass

    def dying_store(self, index, block, results, further):
        if index == 1:
            raise Killed
        store(self, index, block, results, further)

    monkeypatch.setattr(CheckpointStream, "store", dying_store)
    config = CONFIG.model_copy(update={"activations": "disk"})
    with pytest.raises(Killed):
        run(tmp_path / "b", base, config)
    assert (tmp_path / "b/scratch/block-00000").is_dir() and not (tmp_path / "b/scratch/block-00001").exists()
    monkeypatch.setattr(CheckpointStream, "store", store)
    resumed, _ = run(tmp_path / "b", base, config)
    assert digests(resumed) == digests(undisturbed)


def test_killed_distillation_resumes_with_the_same_bytes(make_model_folder, tmp_path):
    base = make_model_folder("qwen3")
    student, _ = run(tmp_path / "ptq", base)
    data = tmp_path / "data"
    data.mkdir()
    rows = [{"prompt": f"what is {i} and {i}?", "response": f"it is {2 * i}"} for i in range(6)]
    pq.write_table(pa.Table.from_pylist(rows), data / "data.parquet")
    config = KDTrainConfig(
        steps=4, warmup_steps=1, batch_size=2, micro_batch_size=2, checkpoint_every=2, scale_mode="recomputed"
    )
    outputs = []

    def distil(folder, last_step):
        output = tmp_path / folder / f"output-{last_step}"
        for new in (output, tmp_path / folder / "scratch"):
            new.mkdir(parents=True, exist_ok=True)

        def sink(event):
            if event["done"] == last_step:
                raise KeyboardInterrupt

        context = Context(output, tmp_path / folder / "scratch", sink=sink)
        return output, lambda: kd_train(config, context, student=student, teacher=base, data=data)

    for folder, killed in (("whole", False), ("broken", True)):
        if killed:
            with pytest.raises(KeyboardInterrupt):
                distil(folder, 3)[1]()
        output, start = distil(folder, 99)
        start()
        outputs.append(output)
    assert digests(outputs[0]) == digests(outputs[1])
    moved = load_file(outputs[0] / "qat/latent.safetensors")
    before = load_file(student / "qat/block-00000.safetensors")
    for end in (".left", ".right", ".diagonal", ".logits", "proj.weight", ".clip"):
        names = [name for name in before if name.endswith(end)]
        assert names and all(not torch.equal(moved[name], before[name]) for name in names)


def test_what_does_not_fit_is_refused_before_any_work(make_model_folder, tmp_path):
    base = make_model_folder("llama")
    for scheme in ("W4", "W3G32"):
        with pytest.raises(ValidationError, match="flatquant transforms activations"):
            PTQInitConfig(method="flatquant", scheme=scheme)
    with pytest.raises(StageError, match="group sizes that work"):
        check_fits(CONFIG.model_copy(update={"scheme": "W4G48A4"}), base)
    with pytest.raises(ValidationError, match="usual is 15"):
        PTQInitConfig(method="flatquant", flatquant={"epochs": 0})
    output, _ = run(tmp_path, base, CONFIG.model_copy(update={"flatquant": FlatQuantOptions(epochs=1)}))
    with pytest.raises(StageError, match="scale_mode='recomputed'"):
        load_student(output, "frozen")
