"""Data files: every kind is read rightly, or refused by one short message with file, line, cause and remedy."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import re
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tasks.data import lines, sources
from tasks.data.files import FORMATS, read_file
from tasks.data.tables import Files
from tasks.dataset import DatasetConfig, dataset, source_digest
from tasks.runtime.stage import Context, StageError

ROW = {"problem": "2+2?", "response": "<think>\nhm\n</think>\n\n\\boxed{4}", "answer": "4"}
ROWS = [ROW, {"problem": 'Ä, "b"?\n\n😀', "response": "x", "answer": "5"}]
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def table_bytes(kind: str) -> bytes:
    table, sink = pa.Table.from_pylist(ROWS), io.BytesIO()
    if kind == "parquet":
        pq.write_table(table, sink)
    else:
        new = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
        with new(sink, table.schema) as writer:
            writer.write_table(table)
    return sink.getvalue()


def parquet_of(problems: pa.Array) -> bytes:
    """One row, whose problem may be what no writer lets pass: bytes under the name of a text."""
    if pa.types.is_binary(problems.type):
        problems = pa.Array.from_buffers(pa.string(), len(problems), problems.buffers())
    sink = io.BytesIO()
    pq.write_table(pa.table({"problem": problems, "answer": ["4"]}), sink)
    return sink.getvalue()


def csv_bytes(delimiter: str = ",", encoding: str = "utf-8") -> bytes:
    sink = io.StringIO(newline="")
    writer = csv.DictWriter(sink, ROW, delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return sink.getvalue().encode(encoding)


def zstd(content: bytes) -> bytes:
    return pa.compress(content, codec="zstd", asbytes=True)


GOOD = {
    "a.jsonl": JSONL,
    "a.ndjson": JSONL,
    "A.JSONL": JSONL,
    "bom.jsonl": b"\xef\xbb\xbf" + JSONL,
    "crlf.jsonl": JSONL.replace(b"\n", b"\r\n\r\n"),
    "utf16.jsonl": JSONL.decode().encode("utf-16"),
    "raw_unicode.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode(),
    "array.json": json.dumps(ROWS).encode(),
    "pretty.json": json.dumps(ROWS, indent=2).encode(),
    "bom.json": b"\xef\xbb\xbf" + json.dumps(ROWS).encode(),
    "lines.json": JSONL,
    "data.json": json.dumps({"version": 1, "data": ROWS}).encode(),
    "train.json": json.dumps({"train": ROWS}).encode(),
    "a.csv": csv_bytes(),
    "semicolons.csv": csv_bytes(";"),
    "bom.csv": b"\xef\xbb\xbf" + csv_bytes(),
    "utf16.csv": csv_bytes(encoding="utf-16"),
    "a.tsv": csv_bytes("\t"),
    "excel.tsv": csv_bytes("\t", "utf-16"),
    "a.jsonl.gz": gzip.compress(JSONL),
    "two.jsonl.gz": gzip.compress(JSONL[:50]) + gzip.compress(JSONL[50:]),
    "a.csv.gz": gzip.compress(csv_bytes()),
    "a.json.gz": gzip.compress(json.dumps(ROWS).encode()),
    "a.jsonl.bz2": bz2.compress(JSONL),
    "a.jsonl.xz": lzma.compress(JSONL),
    "a.jsonl.zst": zstd(JSONL),
    "a.parquet": table_bytes("parquet"),
    "a.arrow": table_bytes("stream"),
    "file.arrow": table_bytes("file"),
    "a.feather": table_bytes("file"),
}


@pytest.fixture
def make(tmp_path):
    """Runs the stage on files: make({"a.jsonl": b"..."}) -> (examples, dataset.json)."""

    def make(files: dict[str, bytes], source: str | None = None, **options):
        folder = tmp_path / "in"
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        return stage(folder / (source if source is not None else next(iter(files))), tmp_path, **options)

    return make


def stage(path: Path, tmp_path: Path, **options):
    out = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
    out.mkdir()
    config = DatasetConfig(source=str(path), **options)
    source_digest(config)
    dataset(config, Context(out, tmp_path))
    return sources.read_dataset(out), json.loads((out / "dataset.json").read_text())


@pytest.mark.parametrize("name", GOOD)
def test_every_kind_of_file_gives_the_same_rows(make, name):
    examples, description = make({name: GOOD[name]})
    assert [{"problem": e.prompt, "response": e.response, "answer": e.answer} for e in examples] == ROWS
    assert description["counts"] == {"read": 2, "incomplete": 0, "filtered": 0, "examples": 2}


def test_what_datasets_saves_is_read(tmp_path):
    saved = datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS), test=datasets.Dataset.from_list(ROWS[:1]))
    saved.save_to_disk(tmp_path / "saved", num_shards={"train": 2, "test": 1})
    for folder, split, num in (
        ("saved", "train", 2),
        ("saved", "test", 1),
        ("saved", "all", 3),
        ("saved/test", "x", 1),
    ):
        examples, description = stage(tmp_path / folder, tmp_path, split=split)
        assert len(examples) == num and examples[-1].answer in "45", folder
        assert all(name.endswith(".arrow") for name in description["source"])
    with pytest.raises(StageError, match=r"no split 'dev' \(splits: train, test\)"):
        stage(tmp_path / "saved", tmp_path, split="dev")
    next((tmp_path / "saved" / "train").glob("*.arrow")).unlink()
    with pytest.raises(StageError, match="is missing"):
        stage(tmp_path / "saved", tmp_path, split="train")
    (tmp_path / "saved" / "test" / "state.json").write_text("[")
    with pytest.raises(StageError, match=r"state\.json"):
        stage(tmp_path / "saved", tmp_path, split="test")


def test_a_clone_of_the_hub_has_a_folder_per_subset(make):
    files = {"main/train-0.jsonl": JSONL, "other/train-0.jsonl": JSONL * 2, "README.md": b"", "config.json": b"{"}
    assert len(make(files, "", subset="main")[0]) == 2
    assert len(make(files, "", split="all")[0]) == 6


def test_a_nested_column_is_read(make):
    rows = [{"prompt": [{"role": "user", "content": "2+2?"}], "reward_model": {"style": "rule", "ground_truth": "4"}}]
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    examples, _ = make({"verl.parquet": sink.getvalue()}, answer_field="reward_model.ground_truth")
    assert [(e.prompt, e.response, e.answer) for e in examples] == [("2+2?", "", "4")]


LONG = "<think>" + "hm " * 60_000 + "</think>"


@pytest.mark.parametrize(
    "name, content",
    [
        ("long.csv", f'problem,response\n2+2?,"{LONG}"\n'.encode()),
        ("long.jsonl", json.dumps({"problem": "2+2?", "response": LONG}).encode()),
        ("no_end.jsonl", json.dumps({"problem": "2+2?", "response": LONG}).encode() + b"\n\n  \n"),
        ("half.jsonl", b'{"problem": "2+2?", "response": "' + LONG.encode() + b'", "more": "\\ud83d"}\n'),
        ("nan.jsonl", b'{"problem": "2+2?", "response": "' + LONG.encode() + b'", "score": NaN}\n'),
    ],
)
def test_unusual_files_that_are_right(make, name, content):
    ((example,), _) = make({name: content})
    assert (example.prompt, example.response) == ("2+2?", LONG)


def test_half_surrogates_are_replaced_and_counted(make):
    rows = b'{"problem": "\\ud83d", "answer": "4"}\n{"problem": "\\ud83d\\ude00", "answer": "4"}\n'
    examples, description = make({"a.jsonl": rows})
    assert [e.prompt for e in examples] == ["\N{REPLACEMENT CHARACTER}", "😀"]
    assert description["changed"] == {"half_surrogates_replaced": 1}


BROKEN = {
    "latin1.jsonl": ('{"problem": "b"}\n{"problem": "café"}\n'.encode("latin-1"), "line 2.*UTF-8.*iconv"),
    "latin1.csv": (b'problem,answer\n"a\nb",1\ncaf\xe9,4\n', "line 4.*UTF-8.*iconv"),
    "latin1.txt": (b"good\n\ncaf\xe9\n", "line 3.*UTF-8"),
    "latin1.json": (b'[\n{"problem": "caf\xe9"}]', "line 2.*UTF-8"),
    "utf16_unmarked.jsonl": (JSONL.decode().encode("utf-16-le"), "line 1.*NUL.*UTF-8"),
    "utf16_cut.csv": (csv_bytes(encoding="utf-16")[:-1], "UTF-16"),
    "nul.csv": (b"problem,answer\na\0b,4\n", "line 2.*NUL"),
    "binary.jsonl": (bytes(range(256)) * 9, "line 1"),
    "binary.json": (bytes(range(255, 0, -1)) * 9, "UTF-8"),
    "binary.parquet": (os.urandom(5000), "get the file again"),
    "binary.arrow": (b"\x10\0\0\0" + bytes(range(255, 0, -1)) * 20, "get the file again"),
    "cut.jsonl.gz": (gzip.compress(JSONL)[:-9], "cut off"),
    "flipped.csv.gz": (gzip.compress(csv_bytes())[:-6] + b"\0\0\0\0\0\0", "cut off"),
    "plain.jsonl.gz": (JSONL, "not packed"),
    "plain.jsonl.bz2": (JSONL, "cut off or damaged|damaged or cut off"),
    "plain.jsonl.xz": (JSONL, "not packed"),
    "plain.jsonl.zst": (JSONL, "damaged or cut off|not packed"),
    "cut.jsonl.xz": (lzma.compress(JSONL)[:-9], "cut off"),
    "cut.jsonl.bz2": (bz2.compress(JSONL)[:-9], "cut off"),
    "cut.parquet": (table_bytes("parquet")[:-40], "get the file again"),
    "middle_cut.parquet": (table_bytes("parquet")[:20] + table_bytes("parquet")[300:], "get the file again"),
    "cut.arrow": (table_bytes("stream")[:-200], "get the file again"),
    "cut_file.arrow": (table_bytes("file")[:-200], "get the file again"),
    "latin1.parquet": (parquet_of(pa.array([b"caf\xe9"]).cast(pa.binary())), "damaged"),
    "far_date.parquet": (parquet_of(pa.array([2**62], pa.timestamp("us"))), "damaged|row 1"),
    "empty.jsonl": (b"", "no rows"),
    "blank.jsonl": (b"\n \n\n", "no rows"),
    "empty.csv": (b"", "no rows"),
    "empty.json": (b"", "no rows"),
    "empty_list.json": (b"[]", "no rows"),
    "empty.txt": (b"", "no rows"),
    "empty.parquet": (b"", "empty file"),
    "empty.arrow": (b"", "empty file"),
    "empty.jsonl.gz": (b"", "no rows|cut off"),
    "header.csv": (b"problem,answer\n", "no rows"),
    "pointer.parquet": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "pointer.jsonl": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "page.jsonl": (b"<!DOCTYPE html>\n<html>", "line 1: not JSON"),
    "array.jsonl": (json.dumps(ROWS).encode(), "line 1: no object"),
    "array_line.jsonl": (JSONL + b"[1, 2]\n", "line 3: no object.*named columns"),
    "number.jsonl": (b'{"text": 5}\n', r"line 1.*'text' \(text_field\).*number"),
    "scalar.json": (b"5", "no list of objects"),
    "mixed_items.json": (b'[{"problem": "a"}, 5]', "item 2 is no object"),
    "two_lists.json": (b'{"train": [{"a": 1}], "test": [{"a": 1}]}', "several lists.*train, test"),
    "broken.json": (b'[{"problem": "a"},\n{"problem": }]', "line 2.*not JSON"),
    "broken.jsonl": (JSONL + b'{"problem": "a"\n', "line 3.*not JSON"),
    "deep.jsonl": (b'{"problem": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n", "line 1.*cannot be read"),
    "deep.json": (b"[" * 100_000 + b"]" * 100_000, "cannot be read"),
    "digits.jsonl": (b'{"problem": "a", "answer": ' + b"9" * 5000 + b"}\n", "line 1.*cannot be read"),
    "twice.jsonl": (b'{"problem": "a", "problem": "b", "answer": "1"}\n', "line 1.*same name: problem"),
    "twice.csv": (b"problem,answer,problem\na,1,b\n", "same name: problem.*rename"),
    "ragged_short.csv": (b"problem,answer\na,1\nb\n", "line 3.*1 fields where the header has 2"),
    "ragged_long.csv": (b"problem,answer\na,1\nb,2,3\n", "line 3.*3 fields where the header has 2"),
    "open_quote.csv": (b'problem,answer\na,1\n"b,2\nc,3\n', "line 4.*not csv"),
    "stray_quote.csv": (b'problem,answer\n"a"b,1\n', "line 2.*not csv"),
    "old_mac.csv": (b"problem,answer\ra,1\r", "line 1.*not csv|no rows"),
    "infinite.jsonl": (b'{"problem": "a", "answer": Infinity}\n', "line 1.*'answer'.*number"),
    "boolean.jsonl": (JSONL + b'{"problem": "a", "response": "x", "answer": true}\n', "line 3.*'answer'.*boolean"),
    "object.jsonl": (b'{"problem": "a", "answer": {"value": "4"}}\n', r"line 1.*'answer'.*object.*answer\.value"),
    "escape.jsonl": (b'{"\\u001b]0;owned\\u0007": "a", "\\ud83d": "b"}\n', "no column for the problems"),
    "unknown.xlsx": (b"PK", r"cannot read this kind of file.*\.parquet"),
    "data.zip": (b"PK", "cannot read this kind of file"),
}


def check_told(error: StageError) -> str:
    message = str(error)
    assert len(message) <= 300 and message.isprintable(), message
    assert re.search(r"[:;,].*\w", message)
    return message


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_one_message(make, name):
    content, expected = BROKEN[name]
    with pytest.raises(StageError) as told:
        make({name: content})
    message = check_told(told.value)
    assert name in message or "no rows" in message or "no column" in message
    assert re.search(expected, message), message


def test_bombs_have_a_limit(make, monkeypatch):
    monkeypatch.setattr(lines, "UNPACKED_FREELY", 2**20)
    row = json.dumps({"problem": "a", "answer": "1"}).encode() + b"\n"
    bomb = row * 400_000
    files = {
        "a.jsonl.gz": gzip.compress(bomb),
        "b.jsonl.xz": lzma.compress(bomb),
        "c.jsonl.zst": zstd(bomb),
        "d.csv.bz2": bz2.compress(b"problem,answer\n" + b"a,1\n" * 3_000_000),
        "e.json.gz": gzip.compress(b"[" + b" " * 2**24 + b"]"),
    }
    for name, content in files.items():
        with pytest.raises(StageError, match=r"unpacks to more than \d+ MiB.*unpack it yourself") as told:
            make({name: content})
        check_told(told.value)
    examples, _ = make({"modest.jsonl.gz": gzip.compress(row * 5000)})
    assert len(examples) == 5000, "under the limit, however well it packs"


def test_lines_and_documents_have_a_limit(make, monkeypatch):
    monkeypatch.setattr(lines, "MOST_LINE_BYTES", 1000)
    monkeypatch.setattr(lines, "MOST_JSON_BYTES", 3000)
    long = json.dumps({"problem": "a" * 2000, "answer": "1"}).encode()
    for name, content, expected in (
        ("a.jsonl", JSONL + long + b"\n", "line 3.*a line of more than"),
        ("a.csv", b"problem,answer\n" + b"a" * 2000 + b",1\n", "line 2.*a line of more than"),
        ("a.json", b"[" + long + b"," + long + b"]", r"in one piece.*\.jsonl"),
        ("a16.jsonl", (JSONL * 20).decode().encode("utf-16"), "in one piece"),
    ):
        with pytest.raises(StageError, match=expected) as told:
            make({name: content})
        check_told(told.value)


def test_places_that_are_no_files(tmp_path, monkeypatch):
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "dangling.jsonl").symlink_to(tmp_path / "gone")
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "train.jsonl").symlink_to(tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    for name in ("folder.jsonl", "dangling.jsonl", "dangling", "loop", "pipe.jsonl", "links", "empty", "x" * 5000):
        with pytest.raises(StageError) as told:
            source_digest(DatasetConfig(source=str(tmp_path / name)))
        check_told(told.value)
    for source in ("~nobody-of-this-name/x.jsonl", "a\0b.jsonl", "./" + "y" * 3000, "/dev/null"):
        with pytest.raises(StageError) as told:
            source_digest(DatasetConfig(source=source))
        check_told(told.value)


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    path = tmp_path / "secret.jsonl"
    path.write_bytes(JSONL)

    def denied(self, *args, **options):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", denied)
    for read in (lambda: source_digest(DatasetConfig(source=str(path))), lambda: list(read_file(path))):
        with pytest.raises(StageError, match=r"secret\.jsonl: cannot be opened \(Permission denied\): check") as told:
            read()
        check_told(told.value)


def test_columns_are_those_of_all_rows_and_files(make):
    rows = [
        {"answer": "4"},
        {"problem": "a", "answer": "5", "id": 0},
        {"problem": "b", "answer": "6", "level": 2, "id": 7},
    ]
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([{"problem": "c", "answer": "8", "id": None}]), sink)
    first = "".join(json.dumps(row) + "\n" for row in rows).encode()
    examples, description = make({"train-0.jsonl": first, "train-1.parquet": sink.getvalue()}, "")
    assert [(e.id, e.prompt, e.tier) for e in examples] == [("0", "a", ""), ("7", "b", "2"), ("3", "c", "")]
    assert description["dropped"] == {"no_prompt": 1}


def read_or_told(path: Path) -> None:
    try:
        table = Files([path])
        table.columns()
        for row in table.rows():
            assert isinstance(row, dict)
    except StageError as error:
        check_told(error)


FUZZED = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
SUFFIXES = sorted({*FORMATS, ".jsonl.gz", ".csv.bz2", ".txt.xz", ".jsonl.zst", ".json.gz"})


@FUZZED
@given(suffix=st.sampled_from(SUFFIXES), content=st.binary(max_size=400))
def test_random_bytes_give_rows_or_one_message(tmp_path_factory, suffix, content):
    path = tmp_path_factory.mktemp("fuzz") / f"a{suffix}"
    path.write_bytes(content)
    read_or_told(path)


@FUZZED
@given(name=st.sampled_from(sorted(GOOD)), data=st.data())
def test_changed_files_give_rows_or_one_message(tmp_path_factory, name, data):
    content = bytearray(GOOD[name])
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        kind = data.draw(st.sampled_from(["flip", "cut", "drop", "double"]))
        if kind == "flip":
            content[place] = data.draw(st.integers(0, 255))
        elif kind == "cut":
            content = content[: max(place, 1)]
        elif kind == "drop":
            content = (content[:place] + content[place + 3 :]) or bytearray(b"x")
        else:
            content = content[:place] + content[place // 2 :]
    path = tmp_path_factory.mktemp("fuzz") / name
    path.write_bytes(bytes(content))
    read_or_told(path)
