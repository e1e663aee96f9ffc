"""The base_model stage: which files come in, from where, and what is said when they cannot."""

import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors.torch import load_file, save_file

import tasks.base_model
from tasks.base_model import BaseModelConfig, base_model, source_digest
from tasks.checkpoints.import_model import hub_commit, import_folder
from tasks.checkpoints.models import check_model_folder
from tasks.runtime.stage import Context, StageError


@pytest.fixture
def run(tmp_path):
    def run(source_digest=None, **options):
        output = tmp_path / "output"
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir()
        return output, base_model(BaseModelConfig(**options), Context(output, tmp_path, source_digest=source_digest))

    return run


def test_local_folder_is_copied_without_what_is_no_model_file(make_model_folder, run):
    source = make_model_folder("qwen2")
    for name in ("pytorch_model.bin", "training_args.json", "optimizer.safetensors", "README.md"):
        (source / name).write_text("x")
    output, metrics = run(model=str(source))
    names = {file.name for file in output.iterdir()}
    assert names == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    for name in names:
        assert (output / name).read_bytes() == (source / name).read_bytes()
        assert (output / name).stat().st_ino != (source / name).stat().st_ino
    assert metrics["bytes"] == sum(file.stat().st_size for file in output.iterdir())
    check_model_folder(output)


def test_digest_follows_the_model_files_only(make_model_folder):
    first, second = make_model_folder("llama", name="a"), make_model_folder("llama", name="b")
    digest = source_digest(BaseModelConfig(model=str(first)))
    assert source_digest(BaseModelConfig(model=str(second))) == digest
    (second / "README.md").write_text("x")
    assert source_digest(BaseModelConfig(model=str(second))) == digest
    (second / "generation_config.json").write_text("{}")
    assert source_digest(BaseModelConfig(model=str(second))) != digest


COMMIT, OTHER = "0123abcd" * 5, "89ef" * 10


class Hub:
    """A hub whose branches move; without a network unless `commits` are given."""

    def __init__(self, monkeypatch, folder: Path | None = None, commits: dict[str | None, str] | None = None) -> None:
        self.folder, self.commits = folder, commits or {}
        self.asked: list[str | None] = []
        self.fetched: list[tuple[str, dict]] = []
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: self)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.download)

    def model_info(self, model: str, revision: str | None = None, timeout: float | None = None) -> SimpleNamespace:
        self.asked.append(revision)
        if revision not in self.commits:
            raise OfflineModeIsEnabled("Cannot reach https://huggingface.co: offline mode is enabled.")
        return SimpleNamespace(sha=self.commits[revision])

    def download(self, model: str, **options) -> str:
        self.fetched.append((model, options))
        if self.folder is None:
            raise LocalEntryNotFoundError("An error happened while trying to locate the files on the Hub")
        return str(self.folder)


@pytest.fixture(autouse=True)
def hub_cache(tmp_path, monkeypatch):
    """An empty one."""
    cached = partial(huggingface_hub.try_to_load_from_cache, cache_dir=tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    hub_commit.cache_clear()
    return tmp_path / "hub"


def test_a_hub_model_is_its_commit_whatever_it_was_asked_by(monkeypatch):
    hub = Hub(monkeypatch, commits={None: COMMIT, "main": COMMIT, "v2": OTHER})
    asked = (None, "main", COMMIT, "v2")
    digests = [source_digest(BaseModelConfig(model="Qwen/Qwen3-0.6B", revision=revision)) for revision in asked]
    assert digests == [COMMIT, COMMIT, COMMIT, OTHER]
    assert hub.asked == [None, "main", "v2"], "a commit needs no network"
    assert {"model", "revision"} <= set(BaseModelConfig.location_fields), "the commit stands for them in the key"


def test_the_stage_fetches_the_commit_of_the_key(make_model_folder, monkeypatch, run):
    hub = Hub(monkeypatch, make_model_folder("llama"), {"main": OTHER})  # main has moved since the key was made
    output, metrics = run(source_digest=COMMIT, model="Qwen/Qwen3-0.6B", revision="main")
    assert metrics["revision"] == COMMIT and (output / "model.safetensors").is_file()
    ((model, options),) = hub.fetched
    assert model == "Qwen/Qwen3-0.6B" and options["revision"] == COMMIT and not hub.asked
    assert "*.safetensors" in options["allow_patterns"]
    assert not any(".bin" in p or p == "*" for p in options["allow_patterns"])


def test_without_a_network_the_local_cache_knows_the_commit(monkeypatch, hub_cache):
    Hub(monkeypatch)
    repository = hub_cache / "models--Qwen--Qwen3-0.6B"
    (repository / "snapshots" / COMMIT).mkdir(parents=True)
    (repository / "snapshots" / COMMIT / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    assert source_digest(BaseModelConfig(model="Qwen/Qwen3-0.6B")) == COMMIT


@pytest.mark.parametrize("revision", [None, "main", "abc123", "v" * 500])
def test_a_hub_model_that_no_commit_is_known_of_is_refused(monkeypatch, revision):
    Hub(monkeypatch)
    with pytest.raises(StageError, match=r"Qwen/Qwen3-4B.*revision=<40 digits>.*--set base_model\.model=PATH") as error:
        source_digest(BaseModelConfig(model="Qwen/Qwen3-4B", revision=revision))
    assert len(str(error.value)) <= 300


def test_offline_names_the_model_and_the_remedy(monkeypatch, run):
    Hub(monkeypatch)
    with pytest.raises(StageError, match=r"Qwen/Qwen3-4B.*--set base_model\.model=PATH") as error:
        run(model="Qwen/Qwen3-4B", revision=COMMIT)
    assert len(str(error.value)) <= 300


def test_a_folder_that_changes_before_it_is_copied_is_refused(make_model_folder, run):
    source = make_model_folder("llama")
    digest = source_digest(BaseModelConfig(model=str(source)))
    run(source_digest=digest, model=str(source))
    (source / "generation_config.json").write_text("{}")
    with pytest.raises(StageError, match="changed while they were copied"):
        run(source_digest=digest, model=str(source))


@pytest.mark.parametrize(
    "model", ["/absent/model", "./absent", "a/b/c", "~/absent", "~nobody-here/x", "x" * 5000 + "/a/b"]
)
def test_missing_path_is_no_hub_id(model):
    with pytest.raises(StageError, match=f"no model folder at {model[:100]}"):
        source_digest(BaseModelConfig(model=model))


def test_incomplete_folder_is_refused_before_it_runs(make_model_folder):
    source = make_model_folder("llama")
    (source / "model.safetensors").unlink()
    with pytest.raises(StageError, match="no weights"):
        source_digest(BaseModelConfig(model=str(source)))


def test_bundled_model_is_found_beside_the_artifacts_package(make_model_folder, monkeypatch, tmp_path, run):
    monkeypatch.setattr(tasks.base_model.artifacts, "__file__", str(tmp_path / "artifacts" / "__init__.py"))
    with pytest.raises(StageError, match="bundled model is not installed"):
        source_digest(BaseModelConfig())
    (tmp_path / "artifacts" / "bundled").mkdir(parents=True)
    make_model_folder("qwen3", name="artifacts/bundled/model")
    output, _ = run()
    check_model_folder(output)


def test_what_is_wrong_with_the_copy_is_told_of_the_folder_that_was_given(make_model_folder, tmp_path: Path) -> None:
    folder, output = make_model_folder("qwen2"), tmp_path / ".tmp-copy"
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    output.mkdir()
    with pytest.raises(StageError, match=r"model\.norm\.weight holds NaN") as told:
        import_folder(folder, output, lambda done, total, name: None)
    assert str(told.value).startswith(f"{folder}: ") and ".tmp-copy" not in str(told.value)
