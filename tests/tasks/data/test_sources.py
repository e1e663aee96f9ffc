"""Reading rows from files and the hub, and mapping columns to examples."""

import gzip
import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.data import sources
from tasks.data.boxes import last_boxed
from tasks.data.fields import PRESETS, Example, choose_fields, recognise
from tasks.data.hub import hub_table
from tasks.data.mapping import to_example
from tasks.data.values import Dropped, kind_of
from tasks.runtime.stage import StageError

ROWS = [{"problem": "1+1", "answer": "2"}, {"problem": "2+2", "answer": "4"}]


def kinds(row):
    return {name: kind_of(value) for name, value in row.items()}


def write_jsonl(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


def test_every_format_gives_the_same_rows(tmp_path):
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    write_jsonl(tmp_path / "b.jsonl", ROWS)
    write_jsonl(tmp_path / "c.jsonl.gz", ROWS)
    for name in ("a.parquet", "b.jsonl", "c.jsonl.gz"):
        assert list(sources.read_rows([tmp_path / name])) == ROWS, name


def test_text_lines_become_paragraphs_or_articles(tmp_path):
    text = " \n = One = \n \n first line \n second \n = = Part = = \n\n = Two = \n\nend\n"
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text.encode()))
    rows = list(sources.read_rows([tmp_path / "a.txt.gz"]))
    assert "".join(row["text"] for row in rows) == text
    paragraphs = [row["text"] for row in sources.paragraphs(rows, "text")]
    assert paragraphs == [" = One = ", " first line \n second \n = = Part = = ", " = Two = ", "end"]
    articles = [row["text"] for row in sources.articles(rows, "text")]
    assert articles == [" \n", text[2 : text.index(" = Two")], " = Two = \n\nend\n"]


def test_folder_gives_the_files_of_the_split(tmp_path):
    for name in ("train-0.jsonl", "train-1.jsonl", "test.jsonl", "README.md"):
        (tmp_path / name).write_text("")
    found = sources.local_files(str(tmp_path), "train")
    assert [file.name for file in found] == ["train-0.jsonl", "train-1.jsonl"]
    assert len(sources.local_files(str(tmp_path), "all")) == 3
    with pytest.raises(StageError, match=r"'validation'.*test\.jsonl, train-0\.jsonl"):
        sources.local_files(str(tmp_path), "validation")
    with pytest.raises(StageError, match=r"README\.md.*\.parquet"):
        sources.local_files(str(tmp_path / "README.md"), "train")


def test_digest_follows_content_not_place(tmp_path):
    (tmp_path / "x").mkdir()
    first, second = write_jsonl(tmp_path / "a.jsonl", ROWS), write_jsonl(tmp_path / "x" / "a.jsonl", ROWS)
    assert sources.files_digest([first]) == sources.files_digest([second])
    write_jsonl(second, ROWS[:1])
    assert sources.files_digest([first]) != sources.files_digest([second])


def test_path_or_hub_id(tmp_path):
    assert sources.is_local(str(tmp_path))
    assert not sources.is_local("open-r1/OpenR1-Math-220k")
    assert not sources.is_local("AI-MO/NuminaMath-1.5")
    for missing in (str(tmp_path / "absent"), "./absent", "a/b/c", "absent.jsonl", "absent.jsonl.gz", "~/absent"):
        with pytest.raises(StageError, match="no such file"):
            sources.is_local(missing)


@pytest.mark.parametrize("line", ["{not json", "[1, 2]"])
def test_bad_json_line_is_named(tmp_path, line):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n\n' + line + "\n")
    with pytest.raises(StageError, match=r"a\.jsonl, line 3"):
        list(sources.read_rows([tmp_path / "a.jsonl"]))


def test_a_hub_table_and_its_errors(monkeypatch):
    calls = []

    def load(*args, **options):
        calls.append((args, options))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    table = hub_table("owner/name", "main", "train", "abc")
    assert list(table.rows()) == ROWS and list(table.rows(["answer"])) == [{"answer": "2"}, {"answer": "4"}]
    assert {name: column.kind for name, column in table.columns().items()} == {"problem": "text", "answer": "text"}
    assert calls == [(("owner/name", "main"), {"split": "train", "revision": "abc"})]

    def offline(*args, **options):
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub\nmore")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(StageError, match=r"owner/name.*Couldn't reach.*local file"):
        hub_table("owner/name", None, "train", "abc")

    def no_subset(*args, **options):
        raise ValueError("BuilderConfig 'x' not found. Available: ['main', 'socratic']")

    monkeypatch.setattr(datasets, "load_dataset", no_subset)
    with pytest.raises(StageError, match=r"main.*socratic"):
        hub_table("owner/name", "x", "train", "abc")


OPENR1 = {
    "problem": "p",
    "answer": "4",
    "uuid": "u1",
    "generations": ["wrong", "right", "right too"],
    "correctness_math_verify": [False, True, True],
    "correctness_llama": None,
}


@pytest.mark.parametrize(
    "preset, row, expected",
    [
        ("openr1_math", OPENR1, Example("u1", "p", "right", "4", "")),
        (
            "openr1_math",
            OPENR1 | {"correctness_math_verify": None, "correctness_llama": [False, False, True]},
            Example("u1", "p", "right too", "4", ""),
        ),
        ("openr1_math", OPENR1 | {"correctness_math_verify": [False] * 3}, Dropped("no_verified_response")),
        ("numinamath_1_5", {"problem": "p", "solution": "s", "answer": "4"}, Example("7", "p", "s", "4", "")),
        (
            "gsm8k",
            {"question": "q", "answer": "2*500 = 1000\n#### 1,000"},
            Example("7", "q", "2*500 = 1000\n#### 1,000", "1000", ""),
        ),
        ("gsm8k", {"question": "q", "answer": "no mark"}, Dropped("no_answer")),
        (
            "math",
            {"problem": "p", "solution": r"so \boxed{\frac{1}{2}}.", "level": "Level 3"},
            Example("7", "p", r"so \boxed{\frac{1}{2}}.", r"\frac{1}{2}", "Level 3"),
        ),
        (
            "traces",
            {"id": "t", "problem": "p", "reasoning": "hm\n", "response": "4", "answer": "4"},
            Example("t", "p", "<think>\nhm\n</think>\n\n4", "4", ""),
        ),
        (
            "traces",
            {"id": "t", "problem": "p", "reasoning": "hm", "response": None, "answer": "4"},
            Dropped("no_response"),
        ),
        ("wikitext2", {"text": " some text \n"}, Example("7", "", " some text \n", "", "")),
        ("wikitext2", {"text": " \n"}, Dropped("no_text")),
    ],
)
def test_presets(preset, row, expected):
    assert to_example(row, choose_fields(kinds(row), preset, {}), 7) == expected
    if preset not in ("numinamath_1_5", "wikitext2") and isinstance(expected, Example):
        assert recognise(row) == preset


def named(*columns):
    return dict.fromkeys(columns, "text")


def test_usual_names_and_overrides():
    fields = choose_fields(named("id", "question", "answer", "final", "difficulty"), None, {"answer": "final"})
    assert (fields.prompt, fields.response, fields.answer, fields.tier) == ("question", None, "final", "difficulty")
    row = {"id": 5, "question": "q", "answer": "long", "final": 72, "difficulty": 2.0}
    assert to_example(row, fields, 0) == Example("5", "q", "", "72", "2.0")
    assert choose_fields(named("text", "url"), None, {}).text == "text"
    assert choose_fields(named("question", "answer", "final"), "gsm8k", {"answer": "final"}).answer_rule == "column"
    boxed = choose_fields(named("problem", "solution"), None, {"answer": "solution", "answer_rule": "boxed"})
    assert to_example({"problem": "p", "solution": r"\boxed{3}"}, boxed, 0) == Example("0", "p", r"\boxed{3}", "3", "")
    solutions = choose_fields(named(*OPENR1, "solution"), "openr1_math", {"response": "solution"})
    assert to_example(OPENR1 | {"solution": "s"}, solutions, 0) == Example("u1", "p", "s", "4", "")
    assert recognise({"question": "q", "answer": "72"}) is None
    assert set(PRESETS) >= {"openr1_math", "numinamath_1_5", "gsm8k", "math", "wikitext2"}


def test_missing_columns_are_named_with_the_nearest():
    with pytest.raises(
        StageError,
        match=r"no column 'promt' for prompt_field, did you mean 'prompt'\? \(columns: prompt \(text\), x \(number\)\)",
    ):
        choose_fields({"prompt": "text", "x": "number"}, None, {"prompt": "promt"})
    with pytest.raises(StageError, match="no column 'question'"):
        choose_fields({"a": "text", "answer": "text"}, "gsm8k", {})
    with pytest.raises(StageError, match=r"columns: a \(text\), b.*prompt_field"):
        choose_fields({"a": "text", "b": ""}, None, {})


def test_row_without_a_column_that_others_have_is_incomplete():
    fields = choose_fields(dict.fromkeys(["problem", "solution"], "text"), None, {})
    assert to_example({"problem": "p"}, fields, 0) == Dropped("no_response")


@pytest.mark.parametrize(
    "text, expected",
    [(r"\boxed{1} then \boxed{2}", "2"), (r"\boxed{a{b}c}", "a{b}c"), (r"\boxed{open", None), ("none", None)],
)
def test_last_boxed(text, expected):
    assert last_boxed(text) == expected
