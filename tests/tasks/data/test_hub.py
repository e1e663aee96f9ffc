"""Data sets on the hub: the commit enters the key and is what the stage loads; without one, one quick message."""

import json

import datasets
import huggingface_hub
import pytest

from tasks.data.hub import commit_of
from tasks.dataset import DatasetConfig, dataset, source_digest
from tasks.runtime.execute import StageRun
from tasks.runtime.stage import Context, StageError

NAME, OLD, NEW = "owner/name", "a" * 40, "b" * 40


@pytest.fixture
def loads(monkeypatch):
    """What `datasets.load_dataset` is asked for."""
    asked = []

    def load(source, subset, **options):
        asked.append((source, subset, options["split"], options["revision"]))
        return datasets.Dataset.from_list([{"problem": "p", "answer": "4"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


def key_of(tmp_path, **options):
    config = DatasetConfig(source=NAME, **options)
    return StageRun(dataset, config, {}, tmp_path, source_digest=source_digest(config)).payload()


@pytest.mark.parametrize("revision", [None, "main", "v1"])
def test_a_branch_or_tag_is_resolved_and_its_commit_is_keyed_and_loaded(hub, loads, tmp_path, revision):
    hub[NAME, revision] = OLD
    before = key_of(tmp_path, revision=revision)
    (tmp_path / "out").mkdir()
    dataset(DatasetConfig(source=NAME, revision=revision), Context(tmp_path / "out", tmp_path))
    assert loads == [(NAME, None, "train", OLD)]
    assert json.loads((tmp_path / "out" / "dataset.json").read_text())["revision"] == OLD
    hub[NAME, revision] = NEW
    assert key_of(tmp_path, revision=revision) == before, "one process means one commit"
    commit_of.cache_clear()
    assert key_of(tmp_path, revision=revision) != before


def test_a_commit_is_taken_without_asking(hub, loads, tmp_path):
    assert commit_of(NAME, OLD) == OLD
    assert key_of(tmp_path, revision=OLD) != key_of(tmp_path, revision=NEW)


def test_the_name_of_a_commit_does_not_count(hub, tmp_path):
    hub[NAME, None] = hub[NAME, "main"] = OLD
    keys = [key_of(tmp_path, revision=revision) for revision in (None, "main", OLD)]
    assert keys[0] == keys[1] == keys[2]
    assert source_digest(DatasetConfig(source=NAME, revision="main")) == OLD


def test_the_commit_of_the_key_is_loaded_though_the_branch_has_moved(hub, loads, tmp_path):
    hub[NAME, None] = NEW
    dataset(DatasetConfig(source=NAME), Context(tmp_path, tmp_path, source_digest=OLD))
    assert [commit for *_, commit in loads] == [OLD]


def test_a_benchmark_whose_newest_state_has_moved_is_refused(hub, monkeypatch, tmp_path):
    rows = datasets.Dataset.from_list([{"problem": "p", "answer": "4"}])
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: rows)
    config = DatasetConfig(benchmark="aime_120", source="hub")
    hub["xiaoyuanliu/AIME90", None] = OLD
    before = source_digest(config)
    dataset(config, Context(tmp_path, tmp_path, source_digest=before))
    hub["xiaoyuanliu/AIME90", None] = NEW
    commit_of.cache_clear()
    with pytest.raises(StageError, match="changed since the run began"):
        dataset(config, Context(tmp_path, tmp_path, source_digest=before))


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("no name"),
        TimeoutError("timed out"),
        ValueError("bad id"),
        RuntimeError("x" * 999),
    ],
)
def test_without_an_answer_the_remedy_is_told(hub, monkeypatch, error):
    def fail(self, *args, **options):
        assert options["timeout"] <= 10
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", fail)
    for revision in (None, "main", "abc123"):
        with pytest.raises(StageError, match=r"owner/name.*set revision to a commit.*or give a local file") as told:
            source_digest(DatasetConfig(source=NAME, revision=revision))
        assert len(str(told.value)) <= 300


@pytest.mark.parametrize(
    "error",
    [ConnectionError("gone"), datasets.exceptions.DatasetGenerationError("cut"), KeyError(1)],
)
def test_what_cannot_be_fetched_is_told(hub, monkeypatch, tmp_path, error):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(StageError, match=r"cannot fetch data set 'owner/name' \(revision a{40}\).*local file") as told:
        dataset(DatasetConfig(source=NAME, revision=OLD), Context(tmp_path, tmp_path))
    assert len(str(told.value)) <= 300
