"""The calibrate stage: crops and padded examples, given and generated, resumable and deterministic."""

import json
import random

import pytest
import torch
from safetensors.torch import load_file

from tasks.calibrate import CalibrateConfig, calibrate
from tasks.checkpoints.models import load_tokenizer
from tasks.data.prompts import encode_example, encode_prompt
from tasks.dataset import DatasetConfig, dataset
from tasks.runtime.stage import Context, StageError
from tasks.sampling.engine import Completion

ROWS = [{"id": f"p{i}", "problem": f"{i}+{i}?", "response": f"<think>{i}</think>{2 * i}" + "!" * i} for i in range(8)]


class FakeEngine:
    """Answers request i of the whole run with tokens that depend on its seed, then the stop token."""

    def __init__(self):
        self.calls, self.lives = [], 100

    def generate(self, requests, sampling, on_finished=None, on_tokens=None):
        self.calls.append([request.seed for request in requests])
        answers, self.stops = [], sampling.stop_token_ids
        for index, request in enumerate(requests):
            if self.lives == 0:
                raise KeyboardInterrupt
            self.lives -= 1
            tokens = (10 + request.seed % 200, 11, *sampling.stop_token_ids[:1])
            answers.append(Completion(tokens, (0.0,) * 3, "length" if request.seed % 4 == 3 else "stop"))
            if on_finished:
                on_finished(index, answers[-1])
        return answers

    def close(self):
        pass


@pytest.fixture
def base(make_model_folder):
    return make_model_folder("qwen3")


@pytest.fixture
def data(tmp_path):
    def make(rows, **options):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        folder = tmp_path / f"data{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        dataset(DatasetConfig(source=str(tmp_path / "rows.jsonl"), **options), Context(folder, tmp_path))
        return folder

    return make


@pytest.fixture
def run(tmp_path, base):
    def run(data_folder, name="out", scratch=None, events=None, generation=None, **options):
        output, scratch = tmp_path / name, scratch or tmp_path / f"scratch_{name}"
        output.mkdir()
        scratch.mkdir(exist_ok=True)
        context = Context(output, scratch, sink=None if events is None else events.append)
        metrics = calibrate(
            CalibrateConfig(generation=generation or {}, **options), context, base=base, data=data_folder
        )
        return load_file(output / "tokens.safetensors"), metrics

    return run


@pytest.fixture
def fake_engine(monkeypatch):
    engine = FakeEngine()
    monkeypatch.setattr("tasks.sampling.open.open_engine", lambda *arguments: engine)
    return engine


def test_crops_are_windows_of_all_texts_joined(run, data, base):
    tensors, metrics = run(data(ROWS), responses="given", num_sequences=5, sequence_length=32, seed=3)
    tokenizer = load_tokenizer(base)
    joined = "".join(f"<s><|user|>{r['problem']}<|end|><|assistant|>{r['response']}<|end|>\n\n" for r in ROWS)
    tokens = tokenizer(joined, add_special_tokens=False)["input_ids"]
    starts = random.Random(3).sample(range(len(tokens) - 31), 5)
    assert tensors["input_ids"].tolist() == [tokens[start : start + 32] for start in starts]
    assert tensors["input_ids"].dtype == tensors["attention_mask"].dtype == torch.int64
    assert bool((tensors["attention_mask"] == 1).all())
    assert metrics["num_text_tokens"] == len(tokens)


def test_examples_are_padded_on_the_right_and_masked(run, data, base):
    tensors, metrics = run(data(ROWS), responses="given", packing="examples", num_sequences=8, sequence_length=28)
    tokenizer = load_tokenizer(base)
    for row, ids, mask in zip(ROWS, tensors["input_ids"], tensors["attention_mask"], strict=True):
        expected = encode_example(tokenizer, row["problem"], row["response"])[0][:28]
        assert ids.tolist() == expected + [tokenizer.pad_token_id] * (28 - len(expected))
        assert mask.tolist() == [1] * len(expected) + [0] * (28 - len(expected))
    assert metrics["num_cut"] == sum(len(encode_example(tokenizer, r["problem"], r["response"])[0]) > 28 for r in ROWS)
    assert metrics["num_cut"] > 0


def test_generated_traces_follow_their_prompts(run, data, base, fake_engine):
    events = []
    generation = {"max_new_tokens": 16, "batch_size": 3, "prompt_suffix": " Box it."}
    options = {"packing": "examples", "num_sequences": 8, "sequence_length": 64, "seed": 2}
    tensors, metrics = run(data(ROWS), events=events, generation=generation, **options)
    tokenizer = load_tokenizer(base)
    for index, row in enumerate(ROWS):
        prompt = encode_prompt(tokenizer, row["problem"], suffix=" Box it.")
        seed = 2 * 1_000_003 + index
        expected = [*prompt, 10 + seed % 200, 11, tokenizer.eos_token_id]
        assert tensors["input_ids"][index][: len(expected)].tolist() == expected
        assert int(tensors["attention_mask"][index].sum()) == len(expected)
    assert [len(call) for call in fake_engine.calls] == [3, 3, 2]
    assert [(event["done"], event["total"]) for event in events] == [(i, 8) for i in range(1, 9)]
    assert metrics["num_truncated"] == 2 and metrics["num_generated_tokens"] == 24


def test_killed_generation_resumes_after_the_last_whole_batch(run, data, fake_engine, tmp_path):
    """Nothing of the journal is rewritten, and a batch that the kill cut short is asked again as a whole."""
    generation = {"max_new_tokens": 16, "batch_size": 3}
    options = {"packing": "examples", "num_sequences": 8, "sequence_length": 64, "generation": generation}
    folder = data(ROWS)
    undisturbed, _ = run(folder, "whole", **options)
    fake_engine.calls, fake_engine.lives = [], 4
    scratch = tmp_path / "kept"
    with pytest.raises(KeyboardInterrupt):
        run(folder, "killed", scratch, **options)
    journal = scratch / "generations.jsonl"
    assert journal.read_bytes().count(b"\n") == 4
    journal.write_bytes(journal.read_bytes() + b'{"key": "a line that was c')
    kept = journal.read_bytes().rpartition(b"\n")[0]
    fake_engine.calls, fake_engine.lives = [], 100
    resumed, _ = run(folder, "resumed", scratch, **options)
    assert [len(call) for call in fake_engine.calls] == [3, 2]
    assert journal.read_bytes().startswith(kept)
    assert torch.equal(resumed["input_ids"], undisturbed["input_ids"])


def test_the_models_own_end_tokens_stop_it(run, data, base, fake_engine):
    """Those of config.json too, as in evaluation and training."""
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"eos_token_id": [7, 9]}))
    options = {"packing": "examples", "num_sequences": 8, "sequence_length": 64}
    run(data(ROWS), generation={"max_new_tokens": 16}, **options)
    assert {7, 9, load_tokenizer(base).eos_token_id} <= set(fake_engine.stops)


def test_real_engine_is_deterministic(run, data, tmp_path):
    generation = {"max_new_tokens": 6, "batch_size": 4, "dtype": "float32"}
    options = {"num_sequences": 4, "sequence_length": 16, "generation": generation}
    folder = data(ROWS)
    run(folder, "a", **options)
    run(folder, "b", **options)
    run(folder, "c", seed=1, **options)
    names = ("tokens.safetensors", "calibration.json")
    assert [(tmp_path / "a" / n).read_bytes() for n in names] == [(tmp_path / "b" / n).read_bytes() for n in names]
    assert (tmp_path / "a" / names[0]).read_bytes() != (tmp_path / "c" / names[0]).read_bytes()


def test_plain_text(run, data):
    rows = [{"text": "some words here"}, {"text": "more of them"}]
    tensors, metrics = run(data(rows), responses="given", num_sequences=2, sequence_length=8)
    assert tensors["input_ids"].shape == (2, 8) and metrics["num_text_tokens"] == len(
        "some words here\n\nmore of them\n\n"
    )


@pytest.mark.parametrize(
    "rows, options, message",
    [
        (ROWS, {"responses": "given", "sequence_length": 4096}, r"8 examples give \d+ tokens.*128.*4096 need.*4223"),
        (ROWS, {"responses": "given", "packing": "examples", "num_sequences": 9}, "9 sequences.*has 8"),
        (ROWS, {"generation": {"max_new_tokens": 250}}, "'p0'.* 8 tokens and max_new_tokens=250.* 256 .*to 248 or"),
        ([{"text": "words"}], {"generation": {"max_new_tokens": 8}}, "plain text.*responses=given"),
        ([{"problem": "q", "answer": "1"}], {"responses": "given"}, "1 of 1 examples have no response"),
    ],
)
def test_bad_input(run, data, fake_engine, rows, options, message):
    with pytest.raises(StageError, match=message):
        run(data(rows), **options)


def test_config_defaults_are_the_published_ones():
    values = CalibrateConfig()
    assert (values.num_sequences, values.sequence_length) == (128, 2048)
    assert (values.generation.temperature, values.generation.top_p) == (0.6, 0.95)
    assert (values.responses, values.packing) == ("generated", "crops")
