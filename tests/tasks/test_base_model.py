"""The base_model stage: which files come in, from where, and what is said when they cannot."""

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

import tasks.base_model
from tasks.base_model import BaseModelConfig, base_model, source_digest
from tasks.checkpoints.models import check_model_folder
from tasks.runtime.stage import Context, StageError


@pytest.fixture
def run(tmp_path):
    def run(**options):
        output = tmp_path / "output"
        output.mkdir()
        return output, base_model(BaseModelConfig(**options), Context(output, tmp_path))

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


def test_hub_model_is_fetched_at_its_revision(make_model_folder, monkeypatch, run):
    source = make_model_folder("llama", name="0123abcd")
    calls = []

    def download(model, **options):
        calls.append((model, options))
        return str(source)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    output, metrics = run(model="Qwen/Qwen3-0.6B", revision="main")
    assert metrics["revision"] == "0123abcd" and (output / "model.safetensors").is_file()
    ((model, options),) = calls
    assert model == "Qwen/Qwen3-0.6B" and options["revision"] == "main"
    assert "*.safetensors" in options["allow_patterns"]
    assert not any(".bin" in p or p == "*" for p in options["allow_patterns"])


def test_hub_digest_names_the_revision():
    digests = {source_digest(BaseModelConfig(model="Qwen/Qwen3-0.6B", revision=r)) for r in (None, "main", "abc")}
    assert len(digests) == 3


def test_offline_names_the_model_and_the_remedy(monkeypatch, run):
    def offline(*args, **options):
        raise LocalEntryNotFoundError("An error happened while trying to locate the files on the Hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(StageError, match=r"Qwen/Qwen3-4B.*--set base_model\.model=PATH"):
        run(model="Qwen/Qwen3-4B")


@pytest.mark.parametrize("model", ["/absent/model", "./absent", "a/b/c", "~/absent"])
def test_missing_path_is_no_hub_id(model):
    with pytest.raises(StageError, match=f"no model folder at {model}"):
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
