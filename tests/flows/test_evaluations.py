"""`reasoning-qat show` and `compare` on evaluations in a store, through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from artifacts.refs import Ref
from artifacts.store import Store
from flows.cli import app
from tasks.evaluation.statistics import summarize

PROBLEMS = {f"p{index}": f"What is {index} + 1?" for index in range(12)}


def samples(num_solved: int, text: str, seeds: tuple[int, ...] = (42, 43)) -> pd.DataFrame:
    """The first problems are solved under every seed, by the strict scorer; the paper's accepts everything."""
    rows = [
        {
            "problem_id": problem,
            "seed": seed,
            "tier": "easy" if index < 6 else "hard",
            "gold": str(index + 1),
            "extracted": str(index + 1) if index < num_solved else None,
            "correct": index < num_solved,
            "extracted_paper": str(index + 1),
            "correct_paper": True,
            "timed_out": False,
            "finish_reason": "stop",
            "num_output_tokens": 20,
            "output_text": f"{text} [bold]{problem}[/bold] <script>alert(1)</script>",
            "details": "",
            "mean_logprob": -0.5,
            "repetition": 0.0,
        }
        for seed in seeds
        for index, problem in enumerate(PROBLEMS)
    ]
    return pd.DataFrame(rows)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("REASONING_QAT_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("COLUMNS", "160")
    return Store()


def commit(
    store: Store, kind: str, stage: str, inputs: dict[str, Ref], files: dict[str, object], **config: object
) -> Ref:
    """An artifact with the given files, and telemetry if it is an evaluation."""
    payload = {
        "stage": stage,
        "version": "1",
        "code": "c",
        "config": config,
        "inputs": {n: str(r) for n, r in inputs.items()},
        "packages": {"torch": "2.0"},
    }
    version = str(config.get("torch", "2.0.1"))
    key, folder = store.key(payload), store.new_folder()
    telemetry = store.scratch(key) / "telemetry" if kind == "evaluation" else None
    if telemetry is not None:
        telemetry.mkdir()
        pd.DataFrame({"seconds": [1.0, 3.0, 8.0], "resumed": [True, False, False]}).to_parquet(
            telemetry / "timings.parquet"
        )
        (telemetry / "hardware.json").write_text(json.dumps({"processor": "abacus"}))
    for name, content in files.items():
        if isinstance(content, pd.DataFrame):
            content.to_parquet(folder / name)
        else:
            (folder / name).write_text(json.dumps(content))
    provenance = {"metrics": {}, "versions": {"torch": version}}
    return store.commit(folder, kind, key, payload, provenance, telemetry=telemetry)


def commit_evaluation(
    store: Store, num_solved: int, text: str, seeds: tuple[int, ...] = (42, 43), **config: object
) -> Ref:
    problems = pd.DataFrame({"id": list(PROBLEMS), "prompt": list(PROBLEMS.values())})
    data = commit(store, "dataset", "dataset", {}, {"data.parquet": problems})
    checkpoint = commit(store, "checkpoint", "kd_train", {}, {"weights": text}, text=text)
    frame = samples(num_solved, text, seeds)
    results = {"task": "sums", **summarize(frame, seeds)}
    files = {"samples.parquet": frame, "results.json": results}
    return commit(store, "evaluation", "evaluate", {"checkpoint": checkpoint, "data": data}, files, **config)


def run(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, list(arguments))
    return done.exit_code, done.output


def test_show_prints_the_figures_and_what_was_measured(store: Store) -> None:
    ref = commit_evaluation(store, 9, "good")
    code, output = run("show", ref.short)
    assert code == 0, output
    for shown in (
        "sums: 12 problems x 2 seeds",
        "75.0 [",  # strict
        "100.0 [",  # paper
        "tier",
        "entropy: 0.5000 nats per token",
        "scorers disagree on: 6 samples",
        "they are: p9 (seed 42)",
        "median 3.0, longest 8.0; 1 resumed",
        "processor: abacus",
    ):
        assert shown in output, shown


def test_show_survives_lost_measurements(store: Store) -> None:
    ref = commit_evaluation(store, 9, "good")
    [record] = [record for record in store.records() if record.ref == ref]
    assert record.telemetry is not None
    (store.path(record.telemetry) / "hardware.json").unlink()
    code, output = run("show", ref.short)
    assert code == 0 and "artifact missing: file hardware.json" in output and "75.0 [" in output


def test_compare_prints_the_difference_and_writes_the_page(store: Store, tmp_path: Path) -> None:
    before = commit_evaluation(store, 12, "good", engine="vllm")
    after = commit_evaluation(store, 6, "bad", engine="transformers")
    page = tmp_path / "new" / "page.html"
    code, output = run("compare", before.short, after.short, "--output", str(page), "--most", "4")
    assert code == 0, output
    assert "-50.0 [" in output and "+0.0 [" in output and " ~" in output, "strict differs, paper is noise"
    assert "they also differ: config.engine vllm -> transformers" in output
    assert "6 problems got worse, 0 better, 6 stayed" in output
    text = page.read_text()
    assert "What is 6 + 1?" in text and "good [bold]p6" in text and "bad [bold]p6" in text
    assert "<script" not in text and text.count("<details") == 4


def test_compare_names_the_remedy(store: Store) -> None:
    before, other_seeds = commit_evaluation(store, 12, "good"), commit_evaluation(store, 9, "bad", seeds=(42,))
    code, output = run("compare", before.short, other_seeds.short)
    assert code == 1 and "12 samples are in only one" in output and "same num_problems and seeds" in output
    [checkpoint, _] = [record.ref for record in store.records() if record.stage == "kd_train"]
    code, output = run("compare", checkpoint.short, before.short)
    assert code == 1 and f"is no evaluation: its evaluations are {before.short}" in output
    code, output = run("compare", "feed", before.short)
    assert code == 1 and "no artifact begins with 'feed'" in output


def test_versions_that_differ_are_told_by_show_and_compare(store: Store, tmp_path: Path) -> None:
    before = commit_evaluation(store, 9, "good", torch="2.0.1")
    after = commit_evaluation(store, 3, "bad", torch="2.0.2")
    code, output = run("compare", before.short, after.short, "--output", str(tmp_path / "page.html"))
    assert code == 0 and "they also differ: torch 2.0.1 -> 2.0.2" in output, output
    code, output = run("show", before.short)
    assert code == 0 and "made with other versions: torch 2.0.1 -> " in output, output


def test_a_report_holds_no_path_of_this_machine(tmp_path: Path) -> None:
    from flows.reporting import _shown
    from tasks.base_model import BaseModelConfig
    from tasks.kd_train import KDTrainConfig

    folder = tmp_path / "mymodel"
    folder.mkdir()
    assert _shown(BaseModelConfig(model=str(folder)))["model"] == "mymodel"
    assert _shown(BaseModelConfig(model="Qwen/Qwen3-0.6B"))["model"] == "Qwen/Qwen3-0.6B"
    assert _shown(KDTrainConfig(checkpoint_every=7)) == _shown(KDTrainConfig(checkpoint_every=8))


def test_ls_keeps_dates_and_digests_whole_on_a_narrow_terminal(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    ref = commit(store, "dataset", "a_stage_whose_name_leaves_little_room", {}, {"data.json": {"rows": 3}})
    record = next(iter(store.records()))
    done = CliRunner().invoke(app, ["ls"])
    assert ref.short in done.output and record.created[:16] in done.output


@pytest.mark.parametrize("command", [["run", "tiny_w2g128"], ["compare", "a", "b"]], ids=" ".join)
@pytest.mark.parametrize("output", ["{file}/x", "/proc/none/x", "/dev/null/x", "n" * 300 + "/x"])
def test_an_output_that_cannot_be_written_is_told_before_any_work(
    command: list[str], output: str, tmp_path: Path, store: Store
) -> None:
    (file := tmp_path / "file").touch()
    code, told = run(*command, "--output", output.format(file=file))
    assert code == 2 and "--output: cannot write" in told and len(told) < 300 and "Prefect" not in told
