"""On a CUDA device every stage computes what it computes on a CPU, up to rounding.  `pytest -m gpu`."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pandas as pd
import pytest
import torch

from tasks.dataset import DatasetConfig, dataset
from tasks.evaluate import EvaluateConfig, evaluate
from tasks.kd_train import KDTrainConfig, kd_train
from tasks.ptq_init import PTQInitConfig, ptq_init
from tasks.runtime.stage import Context

DEVICE = os.environ.get("REASONING_QAT_TEST_DEVICE", "cuda")
"""Any other device than CUDA tries the tests themselves."""
BASE = Path(__file__).parents[2] / "artifacts" / "bundled" / "model"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def context(folder: Path, device: str) -> Context:
    for name in ("output", "scratch"):
        (folder / name).mkdir(parents=True)
    return Context(folder / "output", folder / "scratch", device)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = context(tmp_path_factory.mktemp("data"), "cpu")
    dataset(DatasetConfig(num_examples=16, seed=3), made)
    return made.output


@pytest.fixture(scope="module")
def students(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same PTQ on both devices."""
    made = {device: context(tmp_path_factory.mktemp(device), device) for device in ("cpu", DEVICE)}
    for each in made.values():
        ptq_init(PTQInitConfig(scheme="W3G128", method="rtn", symmetric=True), each, base=BASE)
    return {device: each.output for device, each in made.items()}


def test_round_to_nearest_gives_the_same_bytes(students: dict[str, Path]) -> None:
    files = [sorted(folder.rglob("*.safetensors")) for folder in students.values()]
    assert [file.read_bytes() for file in files[0]] == [file.read_bytes() for file in files[-1]]


def test_distillation_follows_the_same_losses(tmp_path: Path, students: dict[str, Path], data: Path) -> None:
    config = KDTrainConfig(
        steps=3, learning_rate=1e-4, warmup_steps=1, batch_size=8, micro_batch_size=4, max_length=256,
        scale_mode="recomputed", teacher_dtype="float32",
    )  # fmt: skip
    losses = []
    for number, device in enumerate(("cpu", DEVICE)):
        made = context(tmp_path / str(number), device)
        kd_train(config, made, student=students["cpu"], teacher=BASE, data=data)
        rows = [json.loads(line) for line in (made.output / "training_log.jsonl").read_text().splitlines()]
        losses.append([row["loss"] for row in rows])
    assert losses[-1] == pytest.approx(losses[0], rel=1e-3) and losses[0][0] > 0


def test_greedy_answers_are_the_same(tmp_path: Path, data: Path) -> None:
    asked = {"temperature": 0.0, "top_p": 1.0, "max_new_tokens": 160, "dtype": "float32", "batch_size": 16}
    config = EvaluateConfig(name="bundled", seeds=(1,), generation=asked)  # type: ignore[arg-type]
    texts = []
    for number, device in enumerate(("cpu", DEVICE)):
        made = context(tmp_path / str(number), device)
        evaluate(config, made, checkpoint=BASE, data=data)
        texts.append(list(pd.read_parquet(made.output / "samples.parquet")["output_text"]))
    same = sum(a == b for a, b in zip(*texts, strict=True))
    assert same >= 15, f"{same} of 16 answers are the same"
