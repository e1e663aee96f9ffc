"""GRPO on the bundled model without its think tags: each completion's reward is evaluation's strict score of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

from quant.grids.scheme import Scheme
from quant.student.linear import prepare
from tasks.checkpoints.models import load_model, save_student
from tasks.data.bundled_problems import bundled_problems
from tasks.evaluation.config import EvaluateConfig
from tasks.evaluation.scoring import open_scorer
from tasks.grpo_train import GRPOTrainConfig, grpo_train
from tasks.judging.response import Response
from tasks.runtime.stage import Context

BUNDLED_MODEL = Path(__file__).parents[3] / "artifacts" / "bundled" / "model"
CONFIG = GRPOTrainConfig(
    steps=1, warmup_steps=0, batch_size=24, group_size=4, micro_batch_size=8, checkpoint_every=1, num_samples=24,
    generation={"max_new_tokens": 80},
)  # fmt: skip


@pytest.fixture(scope="module", params=["with tags", "without tags"])
def student(request, tmp_path_factory) -> Path:
    """The bundled model in a grid fine enough to solve problems; without tags, its tokens for them have other names."""
    base, folder = tmp_path_factory.mktemp("base") / "model", tmp_path_factory.mktemp("student")
    shutil.copytree(BUNDLED_MODEL, base)
    if request.param == "without tags":
        text = (base / "tokenizer.json").read_text()
        (base / "tokenizer.json").chmod(0o644)
        (base / "tokenizer.json").write_text(text.replace("</think>", "<|b|>").replace("<think>", "<|a|>"))
    model = load_model(base, torch.float32)
    save_student(prepare(model, Scheme.parse("W8G128"), None, "frozen"), base, folder)
    return folder


def test_the_reward_is_evaluations_verdict_completion_by_completion(student, tmp_path):
    rows = bundled_problems("test", 12, seed=5, tiers=("2-3", "4"))
    pd.DataFrame(rows).assign(details="").to_parquet(tmp_path / "data.parquet")
    for name in ("output", "scratch"):
        (tmp_path / name).mkdir()
    metrics = grpo_train(CONFIG, Context(tmp_path / "output", tmp_path / "scratch"), student=student, data=tmp_path)
    samples = pq.read_table(tmp_path / "output" / "rollouts.parquet").to_pylist()
    responses = [Response(row["completion"], row["finish_reason"] == "length", False) for row in samples]
    with open_scorer(EvaluateConfig(), []) as score:
        scores = score(responses, [row["gold"] for row in samples])
    rewards = [row["reward"] for row in samples]
    assert rewards == [float(found.strict.correct) for found in scores] and len(rewards) == 24
    assert 0 < sum(rewards) < 24, "some are right and some are not"
    cut_off = [reward for reward, response in zip(rewards, responses, strict=True) if response.truncated]
    assert cut_off and not any(cut_off)
    log = json.loads((tmp_path / "output" / "training_log.jsonl").read_text())
    assert log["reward_mean"] == metrics["reward_mean"] == pytest.approx(sum(rewards) / 24)
    assert log["grad_norm"] > 0 and log["answer_found_rate"] >= log["reward_mean"]
