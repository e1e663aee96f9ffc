"""Published benchmarks: the table, local copies, hub data sets, and what is said when there is neither."""

import csv
import hashlib
import json
import typing

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.data.benchmark_rows import benchmark_digest, read_benchmark
from tasks.data.benchmarks import BENCHMARKS, HUB, MATH_SUFFIX, BenchmarkName
from tasks.dataset import DatasetConfig, dataset, source_digest
from tasks.runtime.stage import Context, StageError

GPQA = {
    "Record ID": "rec1",
    "High-level domain": "Physics",
    "Question": "Which,\nof these?",
    "Correct Answer": "one",
    "Incorrect Answer 1": "two",
    "Incorrect Answer 2": "three\n",
    "Incorrect Answer 3": "four",
}
ARC = {
    "id": "arc1",
    "question": "p",
    "choices": {"text": ["one", "two", "red"], "label": ["1", "2", "3"]},
    "answerKey": "3",
}
ROWS = {
    "aime_120": [{"problem": "p", "answer": 116, "year": 2025}],
    "math_500": [{"problem": "p", "solution": "s", "answer": "\\frac{1}{2}", "level": 3, "unique_id": "test/1.json"}],
    "gsm8k": [{"question": "p", "answer": "1000 + 234\n#### 1,234"}],
    "gpqa_diamond": [GPQA],
    "livecodebench_v4_v5": [
        {
            "question_id": "abc1",
            "question_content": "Add {two} numbers.",
            "starter_code": "",
            "difficulty": "easy",
            "public_test_cases": json.dumps([{"input": "1 2", "output": "3", "testtype": "stdin"}]),
            "private_test_cases": "[]",
            "metadata": "{}",
        }
    ],
    "winogrande": [
        {"sentence": "Ann thanked Bob because _ had helped.", "option1": "Ann", "option2": "Bob", "answer": "2"}
    ],
    "hellaswag": [
        {"activity_label": "Golf", "ctx_a": "A man swings.", "ctx_b": "he", "endings": ["hits.", "eats."], "label": "0"}
    ],
    "arc_easy": [ARC],
    "arc_challenge": [ARC],
    "piqa": [{"goal": "p", "sol1": "one", "sol2": "two", "label": 1}],
}


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_table_is_the_names_and_data_sets_are_pinned_where_a_commit_is_known():
    assert set(BENCHMARKS) == set(typing.get_args(BenchmarkName)) == set(ROWS)
    unpinned = {d.source for b in BENCHMARKS.values() for d in b.datasets if d.revision is None}
    assert unpinned == {"xiaoyuanliu/AIME90"}
    for benchmark in BENCHMARKS.values():
        assert all(d.revision is None or len(d.revision) == 40 for d in benchmark.datasets)
        assert benchmark.prompt_suffix == (MATH_SUFFIX if benchmark.kind == "math" else "")
    assert {name: BENCHMARKS[name].num_problems for name in ROWS} == {
        "aime_120": 120,
        "math_500": 500,
        "gsm8k": 1319,
        "gpqa_diamond": 198,
        "livecodebench_v4_v5": 268,
        "winogrande": 1267,
        "hellaswag": 10042,
        "arc_easy": 2376,
        "arc_challenge": 1172,
        "piqa": 1838,
    }


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("aime_120", ("0", "p", "116", "2025", "")),
        ("math_500", ("test/1.json", "p", "\\frac{1}{2}", "3", "")),
        ("gsm8k", ("0", "p", "1234", "", "")),
        ("gpqa_diamond", ("rec1", "Which,\nof these?", "one", "Physics", ["one", "two", "three\n", "four"])),
    ],
)
def test_a_local_copy_with_the_published_columns(tmp_path, name, expected):
    write(tmp_path / f"{name}.jsonl", ROWS[name])
    (example,), facts = read_benchmark(name, str(tmp_path))
    details = json.loads(example.details)["choices"] if example.details else ""
    assert (example.id, example.prompt, example.answer, example.tier, details) == expected
    assert facts["source"] == [f"{name}.jsonl"] and facts["published"] == BENCHMARKS[name].num_problems


@pytest.mark.parametrize(
    ("name", "answer", "details"),
    [
        ("winogrande", "B", "Ann thanked Bob because Bob"),
        ("hellaswag", "A", "Golf: A man swings. He"),
        ("arc_easy", "C", "Question: p\nAnswer:"),
        ("piqa", "B", "Question: p\nAnswer:"),
    ],
)
def test_options_are_kept_with_the_letter_of_the_right_one(tmp_path, name, answer, details):
    write(tmp_path / f"{name}.jsonl", ROWS[name])
    (example,), _ = read_benchmark(name, str(tmp_path))
    assert example.answer == answer and json.loads(example.details)["contexts"]["ABC".index(answer)] == details


def test_programs_are_asked_for_in_the_published_words_and_kept_with_their_tests(tmp_path):
    starter = ROWS["livecodebench_v4_v5"][0] | {
        "question_id": "lc1",
        "starter_code": "class Solution:\n    def add(self, a, b):",
        "public_test_cases": json.dumps([{"input": "1\n2", "output": "3", "testtype": "functional"}]),
        "metadata": json.dumps({"func_name": "add"}),
    }
    write(tmp_path / "livecodebench_v4_v5.jsonl", [*ROWS["livecodebench_v4_v5"], starter])
    (stdin, functional), _ = read_benchmark("livecodebench_v4_v5", str(tmp_path))
    assert (stdin.id, stdin.tier) == ("abc1", "easy")
    assert "\n\nQuestion: Add {two} numbers.\n\nRead the inputs from stdin" in stdin.prompt
    assert stdin.prompt.endswith("to STDOUT.\n```python\n# YOUR CODE HERE\n```\n\n")
    assert json.loads(stdin.details) == [{"input": "1 2", "output": "3", "type": "stdin"}]
    assert "\n\nYou will use the following starter code" in functional.prompt
    assert functional.prompt.endswith("delimiters.\n```python\nclass Solution:\n    def add(self, a, b):\n```\n\n")
    assert json.loads(functional.details) == [{"input": "1\n2", "output": "3", "type": "functional", "fn_name": "add"}]
    assert stdin.answer == hashlib.sha256(stdin.details.encode()).hexdigest() != functional.answer


def test_rows_of_another_form_are_refused_with_the_remedy(tmp_path):
    for name, wrong in (("arc_easy", ARC | {"answerKey": "7"}), ("winogrande", {"sentence": "no gap"}), ("piqa", ARC)):
        write(tmp_path / f"{name}.jsonl", [*ROWS[name], wrong])
        with pytest.raises(
            StageError, match=rf"benchmark {name}: row 1 cannot be read .*put {name}\.jsonl .* revision"
        ) as told:
            read_benchmark(name, str(tmp_path))
        assert len(str(told.value)) <= 300


def test_every_form_of_a_copy_gives_the_same(tmp_path):
    write(tmp_path / "a" / "gpqa_diamond.jsonl", [GPQA])
    write(tmp_path / "b" / "gpqa_diamond" / "x.jsonl", [GPQA])
    (tmp_path / "c").mkdir()
    pq.write_table(pa.Table.from_pylist([GPQA]), tmp_path / "c" / "gpqa_diamond.parquet")
    (tmp_path / "d").mkdir()
    with (tmp_path / "d" / "gpqa_diamond.csv").open("w", newline="") as table:
        writer = csv.DictWriter(table, GPQA)
        writer.writeheader()
        writer.writerow(GPQA)
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "gpqa_diamond.json").write_text(json.dumps([GPQA]))
    (tmp_path / "e" / "gpqa_diamond.md").write_text("what the data set is")
    (tmp_path / "e" / "gpqa_diamond_notes.jsonl").write_text("{}")
    examples = [read_benchmark("gpqa_diamond", str(tmp_path / place))[0] for place in "abcde"]
    assert all(example == examples[0] for example in examples)


def test_hub_data_sets_are_asked_for_at_their_commit_and_joined(monkeypatch, hub):
    calls = []
    hub["xiaoyuanliu/AIME90", None] = "a" * 40

    def load(source, subset, **options):
        calls.append((source, subset, options))
        return datasets.Dataset.from_list([{"problem": source, "answer": i, "id": i} for i in (1, 2)])

    monkeypatch.setattr(datasets, "load_dataset", load)
    examples, facts = read_benchmark("aime_120", HUB)
    revision = "6f71d77b0b89b9dabe07ab466c51df33f514df7f"
    assert calls == [
        ("xiaoyuanliu/AIME90", None, {"split": "train", "revision": "a" * 40}),
        ("yentinglin/aime_2025", None, {"split": "train", "revision": revision}),
    ]
    assert [example.id for example in examples] == ["0", "1", "2", "3"], "both data sets count from 1"
    assert [example.tier for example in examples] == ["2022-2024"] * 2 + ["2025"] * 2
    assert facts["datasets"][1]["revision"] == revision


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"no copy of benchmark gsm8k: put gsm8k\.jsonl .*question, answer of openai/gsm8k .*revision 740312a"),
        ({"gsm8k.jsonl": ROWS["gsm8k"], "gsm8k/a.jsonl": ROWS["gsm8k"]}, "several copies"),
        ({"gsm8k.jsonl": []}, "no rows"),
        ({"gsm8k.jsonl": [{"question": "q"}]}, r"no column answer \(columns: question\)"),
        (
            {"gsm8k.jsonl": [*ROWS["gsm8k"], {"question": "q", "answer": "1"}]},
            "row 1 lacks one of question, answer",
        ),
        ({"gsm8k.jsonl": ROWS["gsm8k"] * 1320}, "1320 rows, but it has 1319 problems"),
    ],
)
def test_unusable_copies_are_refused_with_the_remedy(tmp_path, files, message):
    for name, rows in files.items():
        write(tmp_path / name, rows)
    with pytest.raises(StageError, match=message):
        read_benchmark("gsm8k", str(tmp_path))


def test_a_hub_out_of_reach_names_data_set_revision_gate_and_copy(monkeypatch):
    def offline(*arguments, **options):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(StageError) as told:
        read_benchmark("gpqa_diamond", HUB)
    assert len(str(told.value)) <= 300
    for part in ("Idavidrein/gpqa", "633f5ee89ab8ad4522a9f850766b73f62147ffdd", "gated", "hf auth login"):
        assert part in str(told.value)
    assert "gpqa_diamond.jsonl" in str(told.value) and "benchmark_data" in str(told.value)


def test_the_dataset_stage_keeps_details_and_its_key_follows_the_copy(tmp_path, hub):
    hub["xiaoyuanliu/AIME90", None] = "a" * 40
    path = write(tmp_path / "in" / "gpqa_diamond.jsonl", [GPQA])
    config = DatasetConfig(benchmark="gpqa_diamond", source=str(tmp_path / "in"))
    (tmp_path / "out").mkdir()
    dataset(config, Context(tmp_path / "out", tmp_path))
    (row,) = pq.read_table(tmp_path / "out" / "data.parquet").to_pylist()
    assert json.loads(row["details"]) == {"choices": ["one", "two", "three\n", "four"]}
    description = (tmp_path / "out" / "dataset.json").read_text()
    assert json.loads(description)["benchmark"] == "gpqa_diamond" and str(tmp_path) not in description
    before = source_digest(config)
    write(path, [GPQA | {"Question": "Another?"}])
    assert source_digest(config) != before
    assert len({benchmark_digest(name, HUB) for name in BENCHMARKS}) == len(BENCHMARKS)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_what_is_said_without_network_or_copy_is_short(monkeypatch, tmp_path, hub, name):
    def gone(*arguments, **options):
        raise ConnectionError("Couldn't reach the Hub, " * 20)

    monkeypatch.setattr(datasets, "load_dataset", gone)
    write(tmp_path / f"{name}.jsonl", [{f"column_with_a_long_name_{i}": 1 for i in range(50)}])
    for source in (HUB, str(tmp_path / "nowhere" / ("x" * 200)), str(tmp_path)):
        with pytest.raises(StageError, match=r"benchmark_data") as told:
            read_benchmark(name, source)
        assert len(str(told.value)) <= 300


@pytest.mark.parametrize("value", [{"a": 1}, ["a"], True, 5, None, "\ud83d"])
@pytest.mark.parametrize("name", ["hellaswag", "piqa", "winogrande", "arc_easy", "livecodebench_v4_v5"])
def test_a_structure_is_never_part_of_a_benchmarks_prompt(tmp_path, name, value):
    column = {"hellaswag": "ctx_a", "piqa": "goal", "winogrande": "sentence", "arc_easy": "question"}
    write(tmp_path / f"{name}.jsonl", [ROWS[name][0] | {column.get(name, "question_content"): value}])
    with pytest.raises(StageError, match=rf"benchmark {name}: row 0 cannot be read") as told:
        read_benchmark(name, str(tmp_path))
    assert len(str(told.value)) <= 300 and str(told.value).isprintable()


def test_optional_columns_are_those_of_any_row(tmp_path):
    row = ROWS["math_500"][0]
    rows = [{k: v for k, v in row.items() if k not in ("level", "unique_id")}, row | {"unique_id": 0}]
    write(tmp_path / "math_500.jsonl", rows)
    examples, _ = read_benchmark("math_500", str(tmp_path))
    assert [(e.id, e.tier) for e in examples] == [("0", ""), ("0", "3")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs source"),
        ({"source": HUB, "split": "test"}, "settles split"),
        ({"source": HUB, "answer_field": "a", "preset": "gsm8k"}, "settles preset, answer_field"),
        ({"source": HUB, "benchmark": "gsm9k"}, "'gsm8k'"),
    ],
)
def test_contradicting_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DatasetConfig(**{"benchmark": "gsm8k", **options})
