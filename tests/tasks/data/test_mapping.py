"""Data as people have it: what becomes of conversations, structures, numbers and gaps.  Nothing goes through str()."""

import datetime
import io
import json
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.data.sources import read_dataset
from tasks.dataset import DatasetConfig, dataset
from tasks.runtime.stage import Context, StageError

USER, ANSWER = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "\\boxed{4}"}
SYSTEM = {"role": "system", "content": "Box it."}
PARTS = [{"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}]


@pytest.fixture(params=["jsonl", "parquet"])
def make(request, tmp_path):
    """Runs the stage on rows, in two kinds of files: make(row, ...) -> (examples, dataset.json, metrics)."""

    def make(*rows, **options):
        path, out = tmp_path / f"train.{request.param}", tmp_path / "out"
        if request.param == "jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            try:
                pq.write_table(pa.Table.from_pylist(list(rows)), path)
            except (pa.ArrowInvalid, pa.ArrowTypeError):
                pytest.skip("parquet has no columns of mixed types")
        out.mkdir(exist_ok=True)
        metrics = dataset(DatasetConfig(source=str(path), **options), Context(out, tmp_path))
        return read_dataset(out), json.loads((out / "dataset.json").read_text()), metrics

    return make


CONVERSATIONS = {
    "openai": {"messages": [USER, ANSWER]},
    "system": {"messages": [SYSTEM, USER, ANSWER]},
    "developer": {"messages": [{"role": "developer", "content": "x"}, USER, ANSWER]},
    "parts": {"messages": [{"role": "user", "content": PARTS}, ANSWER]},
    "sharegpt": {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "\\boxed{4}"}]},
    "other names": {"conversation": [{"from": "User", "value": "2+2?"}, {"from": "model", "value": "\\boxed{4}"}]},
    "another column": {"dialogue": [USER, ANSWER], "source": "web"},
    "prompt and completion": {"prompt": [USER], "completion": [ANSWER]},
    "prompt of text": {"prompt": "2+2?", "completion": [ANSWER]},
    "beside a prompt": {"prompt": "2+2?", "prompt_id": "a1", "messages": [USER, ANSWER]},
    "written as JSON": {"messages": json.dumps([USER, ANSWER])},
    "alpaca": {"instruction": "2+2?", "input": "", "output": "\\boxed{4}"},
    "query": {"query": "2+2?", "response": "\\boxed{4}", "type": "GSM"},
    "input and output": {"input": "2+2?", "output": "\\boxed{4}"},
    "list of one": {"question": "2+2?", "solution": ["\\boxed{4}"]},
}


@pytest.mark.parametrize("row", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_one_question_with_its_answer(make, row):
    ((example,), description, metrics) = make(row)
    assert (example.prompt, example.response) == ("2+2?", "\\boxed{4}")
    assert metrics["num_with_response"] == 1
    told = isinstance(row.get("messages"), list) and row["messages"][0]["role"] in ("system", "developer")
    assert description["changed"] == ({"system_messages_left_out": 1} if told else {})


def test_alpacas_input_follows_the_instruction(make):
    ((example,), description, _) = make({"instruction": "Add.", "input": "2, 2", "output": "4"})
    assert (example.prompt, example.response) == ("Add.\n\n2, 2", "4")
    assert description["fields"]["input"] == "input"


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_beside_the_answer_becomes_a_think_block(make, key):
    whole = "<think>\nhm\n</think>\n\n\\boxed{4}"
    ((example,), *_) = make({"messages": [USER, {**ANSWER, key: "hm\n"}]})
    assert example.response == whole
    if key != "thinking":
        ((example,), *_) = make({"question": "2+2?", "response": "\\boxed{4}", key: "hm"})
        assert example.response == whole
        ((example,), *_) = make({"question": "2+2?", "response": whole, key: "hm"})
        assert example.response == whole, "not twice"


DROPPED = {
    "multi_turn": {"messages": [USER, ANSWER, USER, ANSWER]},
    "no_user_turn": {"messages": [ANSWER, ANSWER]},
    "no_assistant_turn": {"messages": [SYSTEM, USER]},
    "tool_calls": {"messages": [USER, {"role": "tool", "content": "4"}, ANSWER]},
    "not_only_text": {"messages": [{"role": "user", "content": [{"type": "image", "text": None}]}, ANSWER]},
    "other_role": {"messages": [{"role": "narrator", "content": "x"}, ANSWER]},
    "no_prompt": {"messages": []},
    "no_response": {"messages": [USER, {"role": "assistant", "content": " "}]},
}


@pytest.mark.parametrize("reason", DROPPED)
def test_what_is_no_problem_with_a_response_is_dropped_and_counted(make, reason):
    examples, description, metrics = make({"messages": [USER, ANSWER]}, DROPPED[reason])
    assert len(examples) == 1 and description["counts"]["incomplete"] == 1
    assert description["dropped"] == {reason: 1} and metrics[f"dropped_{reason}"] == 1


def test_nothing_left_names_the_reasons_and_a_remedy(make):
    with pytest.raises(
        StageError, match=r"0 examples left of 3 rows \(2 dropped as multi_turn, 1 .*no_assis.*split"
    ) as told:
        make(DROPPED["multi_turn"], DROPPED["multi_turn"], DROPPED["no_assistant_turn"])
    assert len(str(told.value)) <= 300
    examples, *_ = make({"messages": [USER]}, prompt_field="messages", response_field="")
    assert [(e.prompt, e.response) for e in examples] == [("2+2?", "")]


@pytest.mark.parametrize(
    "value, text",
    [
        ("4", "4"),
        (4, "4"),
        (0, "0"),
        (4.0, "4.0"),
        (0.1, "0.1"),
        (-2.5, "-2.5"),
        (1e22, "10000000000000000000000"),
        (1e-7, "0.0000001"),
        (12345678901234567, "12345678901234567"),
        (["4"], "4"),
        ([4], "4"),
        (" 4 ", " 4 "),
    ],
)
def test_answers_that_are_texts_or_numbers(make, value, text):
    ((example,), *_) = make({"problem": "p", "answer": value, "solution": [text]})
    assert (example.answer, example.response) == (text, text)


def test_decimals_are_kept_as_written(tmp_path):
    table = pa.table({"problem": ["p"], "answer": pa.array([Decimal("4.10")])})
    pq.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "out").mkdir()
    dataset(DatasetConfig(source=str(tmp_path / "a.parquet")), Context(tmp_path / "out", tmp_path))
    assert read_dataset(tmp_path / "out")[0].answer == "4.10"


@pytest.mark.parametrize("value", [None, "", "  ", [], float("nan")])
def test_gaps_are_dropped_and_counted_whatever_they_are_written_as(make, value):
    examples, description, _ = make({"problem": "p", "answer": "4"}, {"problem": "q", "answer": value})
    assert len(examples) == 1 and description["dropped"] == {"no_answer": 1}


def test_several_answers_are_no_answer(make):
    examples, description, _ = make({"problem": "p", "answer": ["4"]}, {"problem": "q", "answer": ["4", "5"]})
    assert [e.answer for e in examples] == ["4"] and description["dropped"] == {"several_values": 1}


@pytest.mark.parametrize("value", [True, {"value": "4"}, [["4"]], [{"value": "4"}], float("inf")])
@pytest.mark.parametrize("column", ["problem", "solution", "answer", "level", "id"])
def test_values_that_mean_no_text_are_refused_with_the_columns(make, column, value):
    row = {"problem": "p", "solution": "s", "answer": "4", "level": "1", "id": "a"}
    options = {"tier_field": "level", "id_field": "id"}
    with pytest.raises(StageError, match=rf"train\..*1: column '{column}' \(\w+_field\) holds .*columns: ") as told:
        make(row | {column: value}, **options)
    assert len(str(told.value)) <= 300


@pytest.mark.parametrize("value", [datetime.date(2026, 1, 2), b"bytes", datetime.timedelta(1)])
def test_dates_and_bytes_mean_no_text(tmp_path, value):
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([{"problem": "p", "answer": value}]), sink)
    (tmp_path / "a.parquet").write_bytes(sink.getvalue())
    with pytest.raises(StageError, match=r"a\.parquet, row 1: column 'answer'"):
        dataset(DatasetConfig(source=str(tmp_path / "a.parquet")), Context(tmp_path, tmp_path))


@pytest.mark.parametrize("text", ["[{'role': 'user', 'content': '2+2?'}]", '[{"from": "human", value}]'])
@pytest.mark.parametrize("column", ["messages", "prompt"])
def test_conversations_that_python_has_written_are_refused(make, text, column):
    with pytest.raises(StageError, match=rf"column '{column}'.*messages written as text, not as JSON.*parquet"):
        make({column: text, "completion": "x"}, prompt_field=column)


def test_one_odd_row_is_named(make):
    with pytest.raises(StageError, match=r"row 3|line 3"):
        make(*[{"problem": "p", "answer": "4"}] * 2, {"problem": "p", "answer": {"a": "4"}})


@pytest.mark.parametrize(
    "row",
    [{"question": "q", "r1_trace": "long"}, {"prompt": "q", "chosen": [USER, ANSWER], "rejected": [USER, ANSWER]}],
)
def test_responses_under_an_unknown_name_are_asked_for(make, row):
    with pytest.raises(StageError, match=r"no column known for responses or answers \(columns: .*response_field"):
        make(row)
    ((example,), *_) = make(row, response_field=list(row)[1])
    assert example.response
    ((example,), description, metrics) = make(row, response_field="")
    assert example.response == "" and metrics["num_with_response"] == 0
    assert set(description["columns_unused"]) == set(row) - {description["fields"]["prompt"]}


def test_problems_alone_need_no_more_words(make):
    ((example,), *_) = make({"problem": "p", "year": 2024})
    assert (example.prompt, example.response, example.answer) == ("p", "", "")


def test_a_response_column_that_is_empty_in_all_rows_is_told(make):
    with pytest.raises(
        StageError, match=r"0 examples left of 2 rows \(2 dropped as no_response\): check response_field"
    ):
        make(*[{"problem": "p", "response": "", "answer": "4"}] * 2)
    ((example,), *_) = make({"problem": "p", "response": "", "solution": "s", "answer": "4"})
    assert example.response == "s", "a column that holds something comes first"


def test_ids(make):
    rows = [{"problem": "p", "answer": "4", "id": i} for i in (0, None, 7)]
    assert [e.id for e in make(*rows)[0]] == ["0", "1", "7"]


def test_a_column_of_conversations_can_give_the_boxed_answer(make):
    ((example,), *_) = make({"messages": [USER, ANSWER]}, answer_field="messages", answer_rule="boxed")
    assert example.answer == "4"


def test_tiers_and_ids_of_another_kind_are_not_chosen_by_themselves(make):
    ((example,), *_) = make({"problem": "p", "answer": "4", "level": {"a": 1}, "id": [1, 2], "uuid": "u"})
    assert (example.tier, example.id) == ("", "u")


def test_filters_are_counted_by_option(make):
    rows = [{"problem": "p" * n, "answer": "4", "level": n} for n in range(1, 6)]
    _, description, _ = make(*rows, max_prompt_chars=3, tiers=["1", "2"])
    assert description["filtered_by"] == {"max_prompt_chars": 2, "tiers": 1}


class Sink:
    """Whoever watches a stage."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def __call__(self, progress) -> None:
        pass

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.mark.parametrize(
    "rows, note",
    [
        ([{"messages": [USER, ANSWER]}, DROPPED["multi_turn"]], "1 of 2 rows dropped: 1 as multi_turn"),
        ([{"messages": [SYSTEM, USER, ANSWER]}], "system messages left out in 1 rows"),
        ([{"question": "q", "answer": "4", "r1_trace": "t"}], "no column known for responses; not used: r1_trace"),
        ([{"question": "q", "answer": "4", "response": "t"}], None),
    ],
)
def test_what_is_left_out_is_told_to_whoever_watches(tmp_path, rows, note):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sink = Sink()
    dataset(DatasetConfig(source=str(tmp_path / "a.jsonl")), Context(tmp_path, tmp_path, sink=sink))
    assert [text.startswith(note or "?") for text in sink.notes] == [True] * (note is not None)
