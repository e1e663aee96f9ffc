"""The one sampler of three stages: what the journal has is not asked again, and every call of an engine is watched."""

from __future__ import annotations

import json
import time
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import pytest

from tasks.calibrate import CalibrateConfig, calibrate
from tasks.evaluate import EvaluateConfig, evaluate
from tasks.grpo_train import GRPOTrainConfig, grpo_train
from tasks.runtime.stage import Context, StageError
from tasks.sampling.config import GenerationConfig
from tasks.sampling.engine import Completion, Request, SamplingParams
from tasks.sampling.journal import Journal
from tasks.sampling.sampler import Sampler, Tally
from tasks.sampling.tokens import needed_length, stop_token_ids

SAMPLING = SamplingParams(1.0, 1.0, 4, (2,))


class Engine:
    """Answers with the request's seed; dies after `lives` completions."""

    def __init__(self, lives: int = 100) -> None:
        self.lives, self.asked = lives, []

    def generate(self, requests, sampling, on_finished=None, on_tokens=None):
        answers = []
        for index, request in enumerate(requests):
            if self.lives == 0:
                raise KeyboardInterrupt
            self.lives -= 1
            self.asked.append(request.seed)
            answers.append(Completion((request.seed, 2), (-0.5, -1.0), "stop"))
            on_finished(index, answers[-1])
        return answers


@contextmanager
def opened(engine, path: Path, **identity):
    with Journal(path) as journal:
        yield Sampler(engine, SAMPLING, GenerationConfig(), journal, identity)


def requests(*seeds: int) -> tuple[list[Request], list[str]]:
    return [Request((1,), seed) for seed in seeds], [f"p{seed}" for seed in seeds]


@pytest.mark.parametrize("together", [False, True])
def test_a_killed_call_asks_only_for_the_rest_or_for_all_of_its_batch(tmp_path, together):
    path, told = tmp_path / "journal", []
    with pytest.raises(KeyboardInterrupt), opened(Engine(lives=2), path) as sampler:
        sampler.sample(*requests(5, 6, 7), Tally(3, lambda done, total: None), together=together)
    engine = Engine()
    with opened(engine, path) as sampler:
        found = sampler.sample(*requests(5, 6, 7), Tally(3, lambda *counts: told.append(counts)), together=together)
    assert engine.asked == ([5, 6, 7] if together else [7])
    assert [generation.token_ids for generation, _ in found] == [(5, 2), (6, 2), (7, 2)]
    assert [resumed for _, resumed in found] == [not together, not together, False]
    assert told == [(1, 3), (2, 3), (3, 3)] and found[0][0].mean_logprob == -0.75
    again = Engine()
    with opened(again, path) as sampler:
        sampler.sample(*requests(5, 6, 7), Tally(3, lambda done, total: None), together=together)
    assert not again.asked


def test_what_another_engine_left_is_not_taken(tmp_path):
    engine = Engine()
    for version in ("1", "2"):
        with opened(engine, tmp_path / "journal", version=version) as sampler:
            sampler.sample(*requests(5), Tally(1, lambda done, total: None))
    assert engine.asked == [5, 5]


class Hanging:
    def generate(self, requests, sampling, on_finished=None, on_tokens=None):
        time.sleep(60)

    def load_weights(self, model):
        pass

    def close(self):
        pass


STALL = {"max_new_tokens": 8, "stall_seconds": 0.2, "stall_limit_seconds": 0.6}
WATCHED = {
    "calibrate": (calibrate, CalibrateConfig(generation=STALL), "base"),
    "evaluate": (evaluate, EvaluateConfig(generation=STALL), "checkpoint"),
    "grpo_train": (
        grpo_train,
        GRPOTrainConfig(steps=1, warmup_steps=0, batch_size=4, group_size=2, micro_batch_size=2, generation=STALL),
        "student",
    ),
}


@pytest.mark.parametrize("name", WATCHED)
def test_an_engine_that_hangs_is_told_and_left_in_every_stage(
    name, tmp_path, monkeypatch, make_student, save_checkpoint
):
    stage, config, model = WATCHED[name]
    monkeypatch.setattr("tasks.sampling.open.open_engine", lambda *arguments: Hanging())
    rows = [{"id": f"p{i}" + "x" * 50, "prompt": f"{i}+1?", "response": "", "answer": str(i + 1)} for i in range(4)]
    pd.DataFrame(rows).assign(tier="", details="").to_parquet(tmp_path / "data.parquet")
    folders, told = [tmp_path / "output", tmp_path / "scratch"], []
    for folder in folders:
        folder.mkdir()
    context = Context(*folders, sink=lambda event: told.append(event["info"].get("stalled", "")))
    inputs = {model: save_checkpoint(make_student("qwen3", learned=False, scheme="W4G32")), "data": tmp_path}
    with pytest.raises(
        StageError, match=r"no token for .*samples \(problems p.*raise generation\.stall_limit_seconds"
    ) as error:
        stage(config, context, **inputs)
    assert len(str(error.value)) <= 300
    assert any("no token for" in message for message in told)


def test_stop_tokens_are_those_of_all_files(tmp_path, make_tokenizer):
    tokenizer = make_tokenizer()
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 7}))
    assert stop_token_ids(tmp_path, tokenizer) == tuple(sorted({7, tokenizer.eos_token_id}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 7]}))
    assert stop_token_ids(tmp_path, tokenizer) == tuple(sorted({7, 9, tokenizer.eos_token_id}))


def test_the_longest_prompt_is_named_where_it_does_not_fit(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 20}))
    prompts = [("a", (1,) * 5), ("b", (1,) * 9), ("b", (1,) * 2)]
    assert needed_length(prompts, 11, tmp_path) == 20
    with pytest.raises(StageError, match=r"'b'.* 9 tokens and max_new_tokens=12 exceed the 20 .*to 11 or less"):
        needed_length(prompts, 12, tmp_path)
