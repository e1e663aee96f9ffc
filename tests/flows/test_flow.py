"""The real flow on a real Prefect server: what runs, what is cached, what the API says.

The stages are the real ones on the bundled model, with few steps.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flows.server import own_server

SMALL = [
    "calibrate.num_sequences=16",
    "calibrate.generation.max_new_tokens=16",
    "kd_train.steps=3",
    "kd_train.warmup_steps=1",
    "kd_train.batch_size=8",
    "kd_train.micro_batch_size=8",
    "train_data.num_examples=64",
    "grpo_train.steps=2",
    "grpo_train.warmup_steps=1",
    "grpo_train.batch_size=16",
    "grpo_train.generation.max_new_tokens=16",
    "rl_data.num_examples=16",
    "test_data.num_examples=12",
    "evaluate.generation.max_new_tokens=32",
    "evaluate.seeds=[1, 2]",
]
TRAINED = ("kd_train", "grpo_train", "evaluate")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server with its own database, and a store, for the tests of this module."""
    home = tmp_path_factory.mktemp("prefect")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_HOME", str(home))
        patch.setenv("REASONING_QAT_STORE", str(home / "store"))
        patch.delenv("PREFECT_API_URL", raising=False)
        with own_server() as (ready, _):
            yield ready()


def as_client(server: str) -> Any:
    """Prefect has read its settings before the server was there."""
    from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

    return temporary_settings({PREFECT_API_URL: server, PREFECT_API_AUTH_STRING: os.environ["PREFECT_API_AUTH_STRING"]})


def run(server: str, **parameters: Any) -> tuple[Any, Counter[tuple[str, str]], dict[str, str]]:
    """Run the flow; returns its result, how often (stage, state) occurred, and the state name by task-run name."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

    from flows.reasoning_qat import reasoning_qat

    parameters = {"recipe": "tiny_w2g128", "overrides": SMALL, "jobs": 1, **parameters}
    with as_client(server):
        state = reasoning_qat(**parameters, return_state=True)

        async def task_runs() -> list[Any]:
            async with get_client() as client:
                chosen = FlowRunFilter(id=FlowRunFilterId(any_=[state.state_details.flow_run_id]))
                for _ in range(40):  # task states reach the server as events, a moment later
                    runs = await client.read_task_runs(flow_run_filter=chosen)
                    if all(r.state is not None and r.state.is_final() for r in runs):
                        break
                    await asyncio.sleep(0.25)
                return runs

        runs = asyncio.run(task_runs())
    names = {r.name: r.state_name for r in runs}
    return state, Counter((name.split(" ")[0], state_name) for name, state_name in names.items()), names


@pytest.fixture(scope="module")
def first(server: str) -> tuple[Any, Counter[tuple[str, str]], dict[str, str]]:
    return run(server)


def test_the_whole_workflow_completes_and_reports(server: str, first: Any) -> None:
    from artifacts.store import Store

    state, counts, _ = first
    assert state.is_completed()
    assert {name for _, name in counts} == {"Completed"}
    store = Store()
    folder = store.path(store.resolve(state.result()))
    page = (folder / "report.html").read_text()
    assert "Reasoning-QAT W2G128" in page and "<script" not in page
    assert {r.stage for r in store.records()} >= {"calibrate", "ptq_init", *TRAINED, "report"}


def test_a_second_run_is_cached_throughout(server: str, first: Any) -> None:
    state, counts, _ = run(server)
    assert {name for _, name in counts} == {"Cached"}
    assert state.result() == first[0].result()


@pytest.mark.slow
def test_a_store_with_a_bit_flipped_in_every_file_is_made_again(
    server: str, first: Any, flip_bit: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    """Safetensors, configurations, tokenizers, parquet, results and manifests: none is read, all come out the same."""
    from artifacts.store import Store

    store = Store()
    refs = {str(record.ref) for record in store.records()}
    for file in (store.root / "objects").rglob("*"):
        if file.is_file() and file.stat().st_size:
            flip_bit(file, 0.5)
    capsys.readouterr()
    state, counts, _ = run(server)
    assert {name for _, name in counts} == {"Completed"}
    assert state.result() == first[0].result()
    assert {str(record.ref) for record in store.records()} == refs
    assert capsys.readouterr().err.count("set aside in quarantine/") == len(list(store.root.glob("quarantine/*/*")))
    assert {name for _, name in run(server)[1]} == {"Cached"}


def test_a_changed_kd_parameter_runs_only_what_follows(server: str, first: Any) -> None:
    _, counts, names = run(server, overrides=[*SMALL, "kd_train.learning_rate=1e-4"])
    ran = {name for name, state in names.items() if state == "Completed"}
    label = "[Reasoning-QAT W2G128]"
    assert ran == {f"kd_train {label}", f"grpo_train {label}", f"evaluate {label}", "report"}
    assert counts["base_model", "Cached"] == 1 and counts["ptq_init", "Cached"] == 1


def test_evaluation_alone_from_cached_artifacts(server: str, first: Any) -> None:
    state, _, names = run(server, force=["evaluate"], only_cached=True)
    assert {name.split(" ")[0] for name, s in names.items() if s == "Completed"} == {"evaluate"}
    assert names["report"] == "Cached", "the same seeds give the same evaluation, so the report is a hit"
    assert state.result() == first[0].result()


def test_a_given_checkpoint_is_evaluated_alone(server: str, first: Any) -> None:
    from artifacts.store import Store

    digest = next(r.ref.digest for r in Store().records() if r.stage == "kd_train")
    _, counts, _ = run(server, checkpoint=digest[:16])
    assert {stage for stage, _ in counts} == {"test_data", "evaluate", "report"}
    assert counts["evaluate", "Completed"] == 1


def test_only_cached_refuses_to_compute(server: str, first: Any) -> None:
    from tasks.runtime.stage import StageError

    state, _, names = run(server, only_cached=True, overrides=[*SMALL, "kd_train.seed=9"])
    assert state.is_failed()
    with pytest.raises(StageError, match="--only-cached"):
        state.result()
    assert names["kd_train [Reasoning-QAT W2G128]"] == "Failed"


def test_data_that_cannot_be_had_ends_the_run_before_any_compute(
    server: str, first: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tasks.runtime.stage import StageError

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    state, _, names = run(server, overrides=[*SMALL, "benchmarks=[gpqa_diamond]", "kd_train.seed=9"])
    with pytest.raises(StageError, match=r"Idavidrein/gpqa.*revision 633f5ee8.*gated.*put gpqa_diamond\.jsonl"):
        state.result()
    assert {name.split(" ")[0] for name in names} <= {
        "base_model",
        "calibration_data",
        "train_data",
        "validation_data",
        "rl_data",
        "test_data",
        "test_data:gpqa_diamond",
    }


def test_plan_says_hit_miss_and_why(server: str, first: Any) -> None:
    from artifacts.store import Store
    from flows.graph import build_graph
    from flows.plan import plan_graph
    from flows.recipes import configured

    def plan(*overrides: str) -> dict[str, tuple[str, str]]:
        graph = build_graph(configured("tiny_w2g128", [*SMALL, *overrides], [], None))
        return {p.node.label: (p.status, p.reason) for p in plan_graph(graph, Store(), "cpu")}

    assert {status for status, _ in plan().values()} == {"HIT"}
    changed = plan("kd_train.temperature=2")
    assert changed["ptq_init [Reasoning-QAT W2G128]"][0] == "HIT"
    status, why = changed["kd_train [Reasoning-QAT W2G128]"]
    assert status == "MISS" and "temperature" in why
    assert changed["grpo_train [Reasoning-QAT W2G128]"] == ("MISS", "waits for kd_train")


def test_artifacts_in_the_ui_for_cached_runs_too(server: str, first: Any) -> None:
    from prefect.client.orchestration import get_client

    with as_client(server), get_client(sync_client=True) as client:
        kinds = Counter((artifact.key, artifact.type) for artifact in client.read_artifacts() if artifact.key)
    assert kinds["tiny-w2g128-accuracy", "table"] >= 2, "one for each run, the cached one included"
    assert kinds["tiny-w2g128-stages", "table"] >= 2
    assert any(kind == "image" for _, kind in kinds)


def test_the_store_is_the_one_of_this_module(server: str) -> None:
    assert Path(os.environ["REASONING_QAT_STORE"]).is_dir()
