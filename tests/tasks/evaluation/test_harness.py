"""Whole evaluations through lighteval's real pipeline, with an engine that recites."""

import ast
import json
import random
import socket
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
import torch

from tasks import evaluate as stage_module
from tasks.evaluation import harness, records
from tasks.evaluation.config import EvaluateConfig
from tasks.evaluation.scoring import Scores, open_scorer
from tasks.judging.math_answer import Verdict
from tasks.runtime.stage import StageError
from tasks.sampling.config import GenerationConfig
from tasks.sampling.tokens import request_seed

CONFIG = EvaluateConfig(name="sums", seeds=(1, 2), generation=GenerationConfig(max_new_tokens=45))


def score(responses, answers):
    """A plain stand-in for the scorers: what the box after the reasoning holds; without reasoning the strict "hangs"
    and the paper's finds an 8."""
    boxed = [
        response.text.partition("</think>")[2].removeprefix("\\boxed{").removesuffix("}") for response in responses
    ]
    return [
        Scores(Verdict(a == b, a or None, timed_out=not a), Verdict((a or "8") == b, a or "8", timed_out=False))
        for a, b in zip(boxed, answers, strict=True)
    ]


@pytest.fixture
def run(checkpoint, tokenizer, write_data, tmp_path, run_harness):
    default_data = []

    def run(engine, config=CONFIG, data=None, scratch="scratch", progress=lambda done, total: None):
        if data is None:
            default_data[:] = default_data or [write_data()]
            data = default_data[0]
        (tmp_path / scratch).mkdir(exist_ok=True)
        evaluation = harness.prepare(config, checkpoint, tokenizer, data)
        return run_harness(evaluation, engine, score, tmp_path / scratch, progress)

    return run


def test_figures_of_a_recited_evaluation(run, reciting_engine):
    _, results, _ = run(reciting_engine())
    assert results["task"] == "sums"
    assert (results["num_problems"], results["seeds"]) == (5, [1, 2])
    assert results["accuracy"] == pytest.approx(3 / 5)
    assert results["per_seed"] == [0.6, 0.6]
    assert results["std"] == 0
    assert {tier: figures["accuracy"] for tier, figures in results["tiers"].items()} == {"easy": 1.0, "hard": 0.5}
    assert results["truncation_rate"] == pytest.approx(1 / 5)
    assert results["grader_timeouts"] == 2
    assert results["sampling"]["temperature"] == 0.6


def test_samples_hold_what_was_asked_and_answered(run, reciting_engine, tokenizer, tmp_path):
    samples, results, _ = run(reciting_engine())
    records.write_artifact(tmp_path, samples, results)
    frame = pd.read_parquet(tmp_path / "samples.parquet")
    ids = ["add", "subtract", "multiply", "divide", "none"]
    assert list(zip(frame["seed"], frame["problem_id"], strict=True)) == [(s, i) for s in (1, 2) for i in ids]
    row = frame.iloc[3]
    assert tokenizer.decode(row["prompt_ids"]) == "<user>9/3=<end><model>"
    assert tokenizer.decode(row["output_ids"]) == "<think></think>\\boxed{9}<end>"
    assert row["output_text"] == "<think></think>\\boxed{9}"
    assert (row["gold"], row["extracted"], row["correct"]) == ("3", "9", False)
    assert (row["num_prompt_tokens"], row["num_output_tokens"]) == (7, 12)
    assert frame["finish_reason"].tolist() == ["stop", "stop", "stop", "stop", "length"] * 2


def test_request_seeds_follow_problem_and_seed_alone(run, reciting_engine, write_data):
    rows = [("a", "1+1=", "", "2", ""), ("b", "5-2=", "", "3", "")]
    engines = [reciting_engine(), reciting_engine()]
    run(engines[0], data=write_data(rows, "one"), scratch="one")
    run(engines[1], data=write_data([*rows[::-1], ("c", "8=", "", "8", "")], "two"), scratch="two")
    first, second = (set(engine.requests) for engine in engines)
    assert len(first) == 4 and first < second
    assert {request.seed for request in first} == {request_seed(s, i) for s in (1, 2) for i in "ab"}
    assert len({request.seed for request in first}) == 4


@pytest.mark.parametrize("lives", [0, 3, 7])
def test_a_killed_evaluation_generates_only_the_rest(run, reciting_engine, tmp_path, lives):
    undisturbed, results, _ = run(reciting_engine(), scratch="undisturbed")
    killed, resumed = reciting_engine(lives=lives), reciting_engine()
    with pytest.raises(KeyboardInterrupt):
        run(killed)
    done = []
    samples, resumed_results, measured = run(resumed, progress=lambda *counts: done.append(counts))
    assert len(killed.requests) == lives and measured.figures["num_samples_resumed"] == lives
    assert sum(measured.timings.column("resumed").to_pylist()) == lives
    assert len(resumed.requests) == 10 - lives
    assert not set(killed.requests) & set(resumed.requests)
    assert samples.equals(undisturbed) and resumed_results == results
    assert done == [(count, 10) for count in range(1, 11)]


def test_an_engine_that_hangs_is_told_and_left_and_what_it_finished_is_kept(run, reciting_engine):
    """It hangs after 3 of 10 samples; the same command then generates the other 7."""
    hanging, told = reciting_engine(lives=3), []
    hanging.die = lambda: time.sleep(60)
    generation = GenerationConfig(max_new_tokens=45, stall_seconds=0.2, stall_limit_seconds=0.6)
    config = CONFIG.model_copy(update={"generation": generation})
    with pytest.raises(StageError, match=r"2 samples \(problems .*\)\. What was finished is kept"):
        run(hanging, config=config, progress=lambda done, total, **info: told.append((done, info)))
    assert any(done == 3 and "no token for" in info.get("stalled", "") for done, info in told)
    resumed = reciting_engine()
    run(resumed)
    assert len(resumed.requests) == 7


def test_artifact_bytes_are_deterministic(run, reciting_engine, tmp_path):
    contents = []
    for name in ("one", "two"):
        samples, results, _ = run(reciting_engine(), scratch=name)
        folder = tmp_path / f"artifact-{name}"
        folder.mkdir()
        records.write_artifact(folder, samples, results)
        contents.append({file.name: file.read_bytes() for file in folder.iterdir()})
    assert contents[0] == contents[1] and set(contents[0]) == {"results.json", "samples.parquet"}
    assert str(tmp_path) not in contents[0]["results.json"].decode()
    assert json.loads(contents[0]["results.json"])["accuracy"] == 0.6


def test_nothing_leaves_the_scratch_folder_or_the_machine(run, reciting_engine, monkeypatch, tmp_path):
    def refuse(*arguments):
        raise AssertionError("an evaluation opened a network connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "usual-cache")
    monkeypatch.chdir(tmp_path)
    random.seed(7)
    np.random.seed(7)
    expected = random.Random(7).random(), np.random.RandomState(7).random_sample()
    run(reciting_engine())
    assert {path.name for path in tmp_path.iterdir()} == {"data", "scratch"}
    assert list((tmp_path / "scratch" / "lighteval" / "datasets").rglob("*.arrow")), (
        "the data set was not cached in scratch"
    )
    assert (random.random(), np.random.random_sample()) == expected, "global random states were not kept"
    assert torch.is_grad_enabled()


def test_lightevals_own_tasks_are_not_loaded_and_xxhash_may_refuse_text(run, reciting_engine, monkeypatch):
    import xxhash

    original = xxhash.xxh64

    def bytes_only(content=b""):
        if isinstance(content, str):
            raise TypeError("Strings must be encoded before hashing")
        return original(content)

    monkeypatch.setattr(xxhash, "xxh64", bytes_only)
    run(reciting_engine())
    assert not [name for name in sys.modules if name.startswith("lighteval.tasks.tasks")]


def test_importing_lighteval_kept_autograd_on():
    assert "lighteval.models.transformers.transformers_model" in sys.modules, "the module that switches it off"
    assert torch.is_grad_enabled()


def test_the_stage_module_imports_lighteval_only_when_it_runs():
    tree = ast.parse(Path(stage_module.__file__).read_text())
    at_the_top = [node.module for node in tree.body if isinstance(node, ast.ImportFrom)]
    assert [name for name in at_the_top if name.startswith("tasks.evaluation")] == ["tasks.evaluation.config"]


def test_suffix_and_thinking_switch_reach_the_prompt(checkpoint, tokenizer, write_data):
    config = EvaluateConfig(
        generation=GenerationConfig(enable_thinking=False, prompt_suffix=" box it", max_new_tokens=8)
    )
    evaluation = harness.prepare(config, checkpoint, tokenizer, write_data())
    text = evaluation.prompts.prepare_prompt(harness.document(vars(evaluation.questions[42][0])))
    assert text == "<user>1+1= box it<end><model><think></think>"
    assert evaluation.max_model_len == len("1+1= box it") + 5 + 8


def test_a_prompt_that_is_too_long_is_named_with_the_setting(checkpoint, tokenizer, write_data):
    data = write_data([("short", "1+1=", "", "2", ""), ("long", "1+" * 20 + "1=", "", "21", "")])
    longer, fitting = (EvaluateConfig(generation=GenerationConfig(max_new_tokens=num)) for num in (20, 19))
    with pytest.raises(StageError, match=r"'long'.* 45 tokens and max_new_tokens=20.* 64 .*to 19 or less"):
        harness.prepare(longer, checkpoint, tokenizer, data)
    assert harness.prepare(fitting, checkpoint, tokenizer, data).max_model_len == 64


def test_a_tokenizer_without_chat_template_is_refused(checkpoint, tokenizer, write_data):
    tokenizer.chat_template = None
    with pytest.raises(StageError, match="chat template"):
        harness.prepare(CONFIG, checkpoint, tokenizer, write_data())


def test_stop_tokens_come_from_generation_config_too(checkpoint, tokenizer, write_data, tmp_path):
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 9]}))
    evaluation = harness.prepare(CONFIG, tmp_path, tokenizer, write_data())
    assert evaluation.sampling.stop_token_ids == (1, 9)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"generation": {"engine": "sglang"}}, "'transformers' or 'vllm'"),
        ({"seeds": (1, 1)}, "repeat"),
        ({"name": "a|b"}, "pattern"),
    ],
)
def test_wrong_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        EvaluateConfig(**wrong)


def test_samples_table_refuses_missing_and_doubled_samples(run, reciting_engine):
    samples, _, _ = run(reciting_engine())
    rows = samples.to_pylist()
    ids = list(pd.unique(samples.column("problem_id").to_pandas()))
    for wrong in (rows[:-1], [*rows, rows[0]], [*rows[:-1], rows[0]]):
        with pytest.raises(RuntimeError, match="expected 10 samples"):
            records.tables(wrong, ids, (1, 2))


def test_both_scorers_stand_beside_each_other(run, reciting_engine):
    samples, results, _ = run(reciting_engine())
    frame = samples.to_pandas()
    assert (results["accuracy"], results["paper"]["accuracy"]) == (0.6, 0.8), "the paper's way finds the 8"
    assert frame["correct"].tolist() == [True, True, True, False, False] * 2
    assert frame["correct_paper"].tolist() == [True, True, True, False, True] * 2
    assert frame["extracted_paper"].tolist() == ["2", "3", "42", "9", "8"] * 2


def test_choices_are_permuted_per_seed_and_recorded(checkpoint, tokenizer, reciting_engine, run_harness, tmp_path):
    """A model that always answers A is right where the permutation put the right choice first."""
    choices = ["one", "two", "red", "sky"]
    rows = [(f"q{i}", f"Which {i}?", "", "one", "", json.dumps({"choices": choices})) for i in range(9)]
    columns = ["id", "prompt", "response", "answer", "tier", "details"]
    (tmp_path / "data").mkdir()
    pd.DataFrame(rows, columns=columns).to_parquet(tmp_path / "data" / "data.parquet")
    long_context = tmp_path / "checkpoint"
    long_context.mkdir()
    config = json.loads((checkpoint / "config.json").read_text()) | {"max_position_embeddings": 1000}
    (long_context / "config.json").write_text(json.dumps(config))
    choice = EvaluateConfig(name="choices", kind="choice", seeds=(1, 2), generation=GenerationConfig(max_new_tokens=30))
    evaluation = harness.prepare(choice, long_context, tokenizer, tmp_path / "data")
    prompts = {f"<user>{question.prompt}<end><model>" for asked in evaluation.questions.values() for question in asked}
    assert len(prompts) > 9, "the two seeds ask in other orders"
    engine = reciting_engine()
    engine.answers = dict.fromkeys(prompts, "<think>hm</think>Answer: A")
    with open_scorer(choice, evaluation.problems) as scorer:
        samples, _, _ = run_harness(evaluation, engine, scorer, tmp_path)
    frame = samples.to_pandas()
    orders = [json.loads(details)["order"] for details in frame["details"]]
    assert frame["correct"].tolist() == frame["correct_paper"].tolist() == [order[0] == 0 for order in orders]
    assert frame["gold"].tolist() == ["ABCD"[order.index(0)] for order in orders]
    for row, order in zip(frame.itertuples(), orders, strict=True):
        shown = [choices[i] for i in order]
        assert "\n\nA) {}\nB) {}\nC) {}\nD) {}<end>".format(*shown) in tokenizer.decode(row.prompt_ids)


def test_whether_the_prompt_opens_the_reasoning_decides_on_untagged_answers(checkpoint, tokenizer, write_data):
    evaluation = harness.prepare(CONFIG, checkpoint, tokenizer, write_data())
    doc = harness.document(vars(evaluation.questions[1][0]))
    assert not evaluation.prompts.opens_reasoning(doc)
    tokenizer.chat_template += "{{ '<think>\n' }}"
    assert evaluation.prompts.opens_reasoning(doc)
