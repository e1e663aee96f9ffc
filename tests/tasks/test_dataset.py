"""The dataset stage: what is kept, drawn and refused, and that the bytes are deterministic."""

import json

import datasets
import pyarrow.parquet as pq
import pytest

from tasks.data.bundled_problems import bundled_problems
from tasks.data.sources import read_dataset
from tasks.dataset import DatasetConfig, dataset, source_digest
from tasks.runtime.stage import Context, StageError

ROWS = [{"problem": f"{i}+1", "solution": "s" * i, "answer": str(i + 1), "level": str(i % 3)} for i in range(1, 41)]


@pytest.fixture
def problems(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture
def run(tmp_path):
    def run(name="out", **options):
        folder = tmp_path / name
        folder.mkdir()
        metrics = dataset(DatasetConfig(**options), Context(folder, tmp_path))
        return read_dataset(folder), json.loads((folder / "dataset.json").read_text()), metrics

    return run


def test_local_file_keeps_all_rows_in_order(problems, run, tmp_path):
    examples, description, metrics = run(source=str(problems))
    assert [e.prompt for e in examples] == [row["problem"] for row in ROWS]
    assert (examples[4].response, examples[4].answer, examples[4].tier) == ("sssss", "6", "2")
    assert pq.read_schema(tmp_path / "out" / "data.parquet").names == [
        "id",
        "prompt",
        "response",
        "answer",
        "tier",
        "details",
    ]
    assert description["source"] == ["train.jsonl"] and str(tmp_path) not in json.dumps(description)
    assert description["fields"]["response"] == "solution"
    assert metrics["examples"] == metrics["num_with_response"] == 40


def test_sampling_is_seeded_and_keeps_the_order(problems, run):
    first, _, _ = run("a", source=str(problems), num_examples=10, seed=1)
    again, _, _ = run("b", source=str(problems), num_examples=10, seed=1)
    other, _, _ = run("c", source=str(problems), num_examples=10, seed=2)
    assert first == again != other
    assert len(first) == 10 and [int(e.id) for e in first] == sorted(int(e.id) for e in first)


def test_same_input_same_bytes(problems, run, tmp_path):
    run("a", source=str(problems), num_examples=10)
    run("b", source=str(problems), num_examples=10)
    for name in ("data.parquet", "dataset.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_filters(problems, run):
    examples, description, _ = run(
        source=str(problems), min_response_chars=10, max_response_chars=20, max_prompt_chars=4, tiers=["0", "1"]
    )
    assert [len(e.response) for e in examples] == [n for n in range(10, 21) if n % 3 in (0, 1)]
    assert description["counts"] == {"read": 40, "incomplete": 0, "filtered": 33, "examples": 7}
    assert run("short", source=str(problems), max_prompt_chars=3)[1]["counts"]["examples"] == 9


def test_incomplete_rows_are_counted(tmp_path, run):
    rows = [{"question": "q1", "answer": "x\n#### 5"}, {"question": "q2", "answer": "no final"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    examples, description, _ = run(source=str(tmp_path / "a.jsonl"))
    assert [e.answer for e in examples] == ["5"]
    assert description["counts"]["incomplete"] == 1 and description["licence"] == "MIT"


def test_bundled_problems_and_stories(run):
    examples, description, _ = run("a", source="bundled", split="test", num_examples=5, seed=3, tiers=["4"])
    assert [e.id for e in examples] == [row["id"] for row in bundled_problems("test", 5, 3, ["4"])]
    assert {e.tier for e in examples} == {"4"} and description["source"] == "bundled"
    stories, _, _ = run("b", source="bundled_stories", num_examples=5)
    assert len(stories) == 5 and {e.prompt for e in stories} == {""}


def test_text_file_becomes_paragraphs(tmp_path, run):
    (tmp_path / "a.txt").write_text("one\nmore\n\n\ntwo\n")
    examples, _, _ = run(source=str(tmp_path / "a.txt"))
    assert [(e.prompt, e.response) for e in examples] == [("", "one\nmore"), ("", "two")]


def test_hub_data_set_by_its_known_columns(monkeypatch, run, hub):
    hub["openai/gsm8k", "r"] = "c" * 40
    rows = [{"question": "q", "answer": "s #### 1,234"}]
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: datasets.Dataset.from_list(rows))
    examples, description, _ = run(source="openai/gsm8k", subset="main", revision="r")
    assert examples[0].answer == "1234" and description["revision"] == "c" * 40 and description["subset"] == "main"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_examples": 41}, "40 examples left of 40 rows.*41 asked for: lower num_examples"),
        ({"tiers": ["9"]}, r"0 examples left.*40 were filtered out.*loosen"),
        ({"prompt_field": "problm"}, "did you mean 'problem'"),
        ({"preset": "gsm8k"}, "no column 'question'"),
        ({"source": "bundled"}, "set num_examples"),
        ({"source": "bundled", "num_examples": 2, "split": "dev"}, "unknown split 'dev'"),
        ({"source": "bundled", "num_examples": 2, "tiers": ["9"]}, "unknown tiers"),
        ({"source": "./absent.jsonl"}, "no such file"),
    ],
)
def test_bad_input(problems, run, options, message):
    with pytest.raises(StageError, match=message):
        run(**({"source": str(problems)} | options))


def test_empty_file(tmp_path, run):
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(StageError, match="no rows"):
        run(source=str(tmp_path / "a.jsonl"))


def test_contradicting_options_are_refused():
    with pytest.raises(ValueError, match="text_field"):
        DatasetConfig(text_field="text", prompt_field="problem")
    with pytest.raises(ValueError, match="no response can pass"):
        DatasetConfig(min_response_chars=5, max_response_chars=4)


def test_source_digest_follows_the_content(problems, tmp_path):
    config = DatasetConfig(source=str(problems))
    before = source_digest(config)
    assert before == source_digest(DatasetConfig(source=str(problems), seed=5))
    problems.write_text(problems.read_text() + "\n")
    assert source_digest(config) != before
    assert source_digest(DatasetConfig(source="bundled")) != source_digest(DatasetConfig(source="bundled_stories"))


def test_a_file_that_changes_after_the_key_was_made_is_refused(problems, tmp_path):
    config = DatasetConfig(source=str(problems))
    context = Context(tmp_path, tmp_path, source_digest=source_digest(config))
    dataset(config, context)
    problems.write_text(problems.read_text().replace("1+1", "9+1"))
    with pytest.raises(StageError, match=r"changed since the run began.*run the same command again"):
        dataset(config, context)


def test_a_name_that_chooses_the_columns_is_part_of_the_key():
    """The commit stands for the hub's id, and a renamed data set has one commit under two names."""
    known, renamed = DatasetConfig(source="openai/gsm8k"), DatasetConfig(source="gsm8k")
    assert known.keyed()["preset"] == "gsm8k" and renamed.keyed()["preset"] is None
    assert DatasetConfig(source="gsm8k", preset="gsm8k").keyed()["preset"] == "gsm8k"
