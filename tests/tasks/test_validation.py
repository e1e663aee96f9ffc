"""Held-out measures in the training stages: exact, harmless, and a start that is never lost."""

from __future__ import annotations

import math
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from flows.config import ConfigError, apply_overrides
from flows.graph import build_graph
from flows.recipes import qwen3_0_6b_w3g128, tiny_w2g128
from tasks.checkpoints.models import load_model, load_tokenizer
from tasks.data.bundled_problems import bundled_problems
from tasks.grpo_train import GRPOTrainConfig, grpo_train
from tasks.kd_train import KDTrainConfig, kd_train
from tasks.runtime.stage import StageError
from tasks.sft_train import SFTTrainConfig, sft_train
from tasks.teacher_topk import TeacherTopKConfig, teacher_topk
from tasks.training.student_training import read_examples
from tests.tasks.test_train_stages import (  # noqa: F401 - fixtures among them
    RL,
    SMALL,
    Killed,
    context_of,
    data,
    files,
    killed_at,
    one_thread,
    open_length_judge,
    read_log,
    student,
    teacher,
    tokenizer,
)  # fmt: skip

WATCHED = SMALL | {"validate_every": 2}


@pytest.fixture(scope="module")
def held_out(tmp_path_factory) -> Path:
    """Other problems than those of `data`, and a text without a prompt."""
    folder = tmp_path_factory.mktemp("held_out")
    rows = [{name: str(row[name]) for name in row} | {"details": ""} for row in bundled_problems("test", 7, 1)]
    rows.append({**rows[0], "id": "text", "prompt": "", "answer": "", "tier": ""})
    pq.write_table(pa.Table.from_pylist(rows), folder / "data.parquet")
    return folder


def full_means(checkpoint: Path, teacher: Path, data: Path) -> dict[str, float]:  # noqa: F811
    """KL on predicted tokens and on prompts, and cross entropy, from whole logits in float64, row by row."""
    examples, _ = read_examples(data, load_tokenizer(teacher), KDTrainConfig(**SMALL))
    model, full = (load_model(folder, torch.float32).double() for folder in (checkpoint, teacher))
    found: dict[str, list[float]] = {"kl": [], "prompt_kl": [], "cross_entropy": []}
    for example in examples:
        ids = example.ids.long()[None]
        with torch.no_grad():
            p, q = (m(ids).logits[0, :-1].log_softmax(-1) for m in (full, model))
        kl = (p.exp() * (p - q)).sum(-1)
        start = example.start - 1
        found["kl"] += kl[start:].tolist()
        found["prompt_kl"] += kl[:start].tolist()
        found["cross_entropy"] += (-q.gather(-1, ids[0, 1:, None])[start:, 0]).tolist()
    return {name: math.fsum(values) / len(values) for name, values in found.items()}


RATES = [1e-7, 1e-5, 1e-3, 3e-2, 1.0, 10.0]


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("objective", ["sft", "forward", "reverse"])
def test_no_learning_rate_ends_below_its_start(tmp_path, student, teacher, data, held_out, rate, objective):  # noqa: F811
    """The kept state's measure, computed anew from the artifact and whole logits, is at most the start's."""
    given = WATCHED | {"learning_rate": rate, "keep": "best"}
    context, name = context_of(tmp_path), "kl"
    inputs = dict(student=student, data=data, validation=held_out)
    if objective == "sft":
        name = "cross_entropy"
        facts = sft_train(SFTTrainConfig(**given), context, **inputs)
    else:
        facts = kd_train(KDTrainConfig(**given, direction=objective), context, **inputs, teacher=teacher)
    start, kept = (full_means(folder, teacher, held_out)[name] for folder in (student, context.output))
    assert kept <= start + 1e-6
    assert facts[f"validation_{name}_start"] == pytest.approx(start, rel=1e-3)
    assert facts[f"validation_{name}_best"] == pytest.approx(kept, rel=1e-3)
    if rate >= 1.0 and objective != "sft":  # the random teacher itself is far from the data
        assert facts["kept_step"] == 0 and facts[f"validation_{name}_last"] > 2 * facts[f"validation_{name}_start"]
    if rate == 1e-3:
        assert facts["kept_step"] > 0 and kept < start


@pytest.mark.parametrize("rate", [1.0, 10.0])
def test_the_last_state_is_below_its_start_at_rates_far_too_high(tmp_path, student, teacher, data, held_out, rate):  # noqa: F811
    context = context_of(tmp_path)
    config = KDTrainConfig(**(WATCHED | {"learning_rate": rate, "keep": "last"}))
    facts = kd_train(config, context, student=student, teacher=teacher, data=data, validation=held_out)
    assert full_means(context.output, teacher, held_out)["kl"] > full_means(student, teacher, held_out)["kl"]
    assert facts["kept_step"] == 6


@pytest.mark.parametrize("scale_mode", ["frozen", "recomputed", "learned"])
def test_the_start_that_is_kept_is_the_start_to_the_bit(tmp_path, student, teacher, data, held_out, scale_mode):  # noqa: F811
    context = context_of(tmp_path)
    config = KDTrainConfig(**(WATCHED | {"learning_rate": 10.0}), scale_mode=scale_mode)
    facts = kd_train(config, context, student=student, teacher=teacher, data=data, validation=held_out)
    assert facts["kept_step"] == 0
    paths = [path.relative_to(student) for path in sorted(student.rglob("*.safetensors"))]
    assert len(paths) == 2
    for path in paths:
        before, after = load_file(student / path), load_file(context.output / path)
        assert before.keys() == after.keys() and all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_measures_equal_the_full_computation(tmp_path, student, teacher, data, held_out, precision):  # noqa: F811
    """Chunked, padded and batched against whole logits in float64; bf16 is off by its rounding only."""
    expected, close = full_means(student, teacher, held_out), {"no": 1e-5, "bf16": 2e-2}[precision]
    given = WATCHED | {"steps": 1, "mixed_precision": precision}
    kd, sft = context_of(tmp_path / "kd"), context_of(tmp_path / "sft")
    config = KDTrainConfig(**given, teacher_dtype="float32", direction="reverse", temperature=2.0)
    kd_train(config, kd, student=student, teacher=teacher, data=data, validation=held_out)
    sft_train(SFTTrainConfig(**given), sft, student=student, data=data, validation=held_out)
    first, other = (read_log(context.output / "training_log.jsonl")[0] for context in (kd, sft))
    assert first["step"] == other["step"] == 0
    assert first["validation_kl"] == pytest.approx(expected["kl"], rel=close)
    assert first["validation_prompt_kl"] == pytest.approx(expected["prompt_kl"], rel=close)
    assert other["validation_cross_entropy"] == pytest.approx(expected["cross_entropy"], rel=close)


def test_watching_changes_nothing_that_is_trained(tmp_path, student, teacher, data, held_out):  # noqa: F811
    """keep: last with held-out data gives the weights and losses of a run without; the log has the curve beside."""
    config = KDTrainConfig(**WATCHED, keep="last")
    inputs = dict(student=student, teacher=teacher, data=data)
    plain, watched = context_of(tmp_path / "plain"), context_of(tmp_path / "watched")
    kd_train(config, plain, **inputs)
    kd_train(config, watched, **inputs, validation=held_out)
    plain_files, watched_files = files(plain.output), files(watched.output)
    log = "training_log.jsonl"
    assert {k: v for k, v in plain_files.items() if k != log} == {k: v for k, v in watched_files.items() if k != log}
    rows = read_log(watched.output / log)
    assert [row["step"] for row in rows if "validation_kl" in row] == [0, 2, 4, 6]
    without = [{k: v for k, v in row.items() if not k.startswith("validation_")} for row in rows[1:]]
    assert without == read_log(plain.output / log)


@pytest.mark.parametrize("rate", [1e-3, 1.0])
@pytest.mark.parametrize("stop_at", [1, 3, 5])
def test_a_killed_stage_gives_the_same_bytes(tmp_path, student, teacher, data, held_out, rate, stop_at):  # noqa: F811
    config = KDTrainConfig(**(WATCHED | {"learning_rate": rate}), patience=4)
    inputs = dict(student=student, teacher=teacher, data=data, validation=held_out)
    whole, broken = context_of(tmp_path / "whole"), context_of(tmp_path / "broken")
    facts = kd_train(config, whole, **inputs)
    with pytest.raises(Killed):
        kd_train(config, killed_at(stop_at, broken), **inputs)
    again = context_of(tmp_path / "broken")
    assert kd_train(config, again, **inputs) == facts
    assert files(again.output) == files(whole.output)


def test_with_a_cached_teacher_the_measure_is_still_the_full_one(tmp_path, student, teacher, data, held_out):  # noqa: F811
    cache, context = context_of(tmp_path / "cache"), context_of(tmp_path / "kd")
    teacher_topk(TeacherTopKConfig(k=4, max_length=256), cache, teacher=teacher, data=data)
    config = KDTrainConfig(**(WATCHED | {"steps": 1}), teacher_dtype="float32")
    inputs = dict(student=student, teacher=teacher, data=data, teacher_topk=cache.output)
    facts = kd_train(config, context, **inputs, validation=held_out)
    assert facts["validation_kl_start"] == pytest.approx(full_means(student, teacher, held_out)["kl"], rel=1e-5)


@pytest.mark.parametrize("keep", ["best", "last"])
def test_grpo_chooses_by_the_judge_and_resumes(tmp_path, monkeypatch, student, data, held_out, keep):  # noqa: F811
    monkeypatch.setattr("tasks.judging.judge.open_judge", open_length_judge)
    config = GRPOTrainConfig(**(RL | {"steps": 6, "learning_rate": 3e-3}), validate_every=2, keep=keep)
    inputs = dict(student=student, data=data, validation=held_out)
    whole, broken = context_of(tmp_path / "whole"), context_of(tmp_path / "broken")
    facts = grpo_train(config, whole, **inputs)
    with pytest.raises(Killed):
        grpo_train(config, killed_at(3, broken), **inputs)
    again = context_of(tmp_path / "broken")
    assert grpo_train(config, again, **inputs) == facts
    assert files(again.output) == files(whole.output)
    rows = read_log(whole.output / "training_log.jsonl")
    curve = [row["validation_accuracy"] for row in rows if "validation_accuracy" in row]
    assert len(curve) == 4 and len(set(curve)) > 1 and all(value * 7 == round(value * 7) for value in curve)
    assert facts["validation_accuracy_best"] == max(curve) and facts["validation_accuracy_start"] == curve[0]
    assert facts["kept_step"] == (2 * curve.index(max(curve)) if keep == "best" else 6)


def test_choosing_by_data_that_is_not_there_is_refused(tmp_path, student, teacher, data):  # noqa: F811
    context = context_of(tmp_path)
    for changes in ({"keep": "best"}, {"patience": 2}):
        with pytest.raises(StageError, match="give validation_data, or set keep=last"):
            kd_train(KDTrainConfig(**SMALL, **changes), context, student=student, teacher=teacher, data=data)
        with pytest.raises(StageError, match="give validation_data, or set keep=last"):
            sft_train(SFTTrainConfig(**SMALL, **changes), context, student=student, data=data)
        with pytest.raises(StageError, match="give validation_data, or set keep=last"):
            grpo_train(GRPOTrainConfig(**RL, **changes), context, student=student, data=data)


@pytest.mark.parametrize("override", ["kd_train.keep=best", "kd_train.patience=3", "grpo_train.keep=best"])
def test_and_is_told_when_it_is_typed(override):
    with pytest.raises(ConfigError, match=f"validation_data is missing: {override.partition('.')[0]} chooses by it"):
        apply_overrides(qwen3_0_6b_w3g128(), [override])


def test_held_out_data_that_nothing_is_left_of_is_named(tmp_path, student, data, held_out):  # noqa: F811
    config = SFTTrainConfig(**(SMALL | {"max_length": 3, "overlong": "drop"}))
    with pytest.raises(StageError, match=r"^no example is left"):
        sft_train(config, context_of(tmp_path / "a"), student=student, data=data, validation=held_out)
    empty = tmp_path / "empty"
    empty.mkdir()
    pq.write_table(pq.read_table(held_out / "data.parquet").slice(0, 0), empty / "data.parquet")
    with pytest.raises(StageError, match=r"^validation_data: no example is left"):
        sft_train(SFTTrainConfig(**SMALL), context_of(tmp_path / "b"), student=student, data=data, validation=empty)
    with pytest.raises(StageError, match=r"^validation_data: no problem is left"):
        grpo_train(GRPOTrainConfig(**RL), context_of(tmp_path / "c"), student=student, data=data, validation=empty)


@pytest.mark.parametrize(
    "override", ["validation_data.seed=8", "kd_train.keep=last", "kd_train.validate_every=7", "kd_train.patience=2"]
)
def test_what_decides_the_choice_is_in_the_key_of_training_alone(override):
    before, after = (build_graph(apply_overrides(tiny_w2g128(), o)).nodes.values() for o in ([], [override]))
    ids = [{node.stage.name: node.id for node in nodes if node.role != "validation_data"} for nodes in (before, after)]
    changed = {name for name in ids[0] if ids[0][name] != ids[1][name]}
    assert {"kd_train", "grpo_train"} <= changed and not changed & {"base_model", "calibrate", "ptq_init"}
