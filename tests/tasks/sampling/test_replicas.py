"""Replicas of the real engine in real processes, on the bundled model: same answers, and no process left behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from tasks.checkpoints.models import load_tokenizer
from tasks.data.bundled_problems import bundled_problems
from tasks.runtime.stage import StageError
from tasks.sampling.engine import Completion, EngineOptions, Request, SamplingParams, TokenPair
from tasks.sampling.registry import open_engine
from tasks.sampling.replica_process import Replica
from tasks.sampling.replicas import ReplicatedEngine, chunk_size, device_groups, visible_devices

REPOSITORY = Path(__file__).parents[3]
MODEL = REPOSITORY / "artifacts" / "bundled" / "model"
OPTIONS = EngineOptions(max_model_len=512, dtype="float32", batch_size=2)
STOP_ID = load_tokenizer(MODEL).eos_token_id
SAMPLING = SamplingParams(1.0, 0.95, 40, (STOP_ID,))
UNKNOWN_TOKEN = 10**6


def make_requests(num: int) -> list[Request]:
    tokenizer = load_tokenizer(MODEL)
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}], add_generation_prompt=True, return_dict=False
        )
        for row in bundled_problems("test", num, seed=3)
    ]
    return [Request(tuple(prompt), seed=index) for index, prompt in enumerate(prompts)]


def open_replicas() -> ReplicatedEngine:
    return ReplicatedEngine("transformers", MODEL, 2, OPTIONS)


def assert_same(found: Completion, expected: Completion) -> None:
    assert (found.token_ids, found.finish_reason) == (expected.token_ids, expected.finish_reason)
    assert found.logprobs == pytest.approx(expected.logprobs, abs=2e-4)


Children = Callable[[], list[BaseProcess]]


@pytest.fixture
def children() -> Children:
    """The processes that this test has started and that live."""
    before = multiprocessing.active_children()
    return lambda: [child for child in multiprocessing.active_children() if child not in before]


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    return make_requests(9)


@pytest.fixture(scope="module")
def expected(requests: list[Request]) -> list[Completion]:
    return open_engine("transformers", MODEL, OPTIONS).generate(requests, SAMPLING)


@pytest.fixture(scope="module")
def replicas() -> Iterator[ReplicatedEngine]:
    engine = open_replicas()
    processes = multiprocessing.active_children()
    yield engine
    engine.close()
    assert [process.exitcode for process in processes] == [0, 0]


def test_completions_are_those_of_one_engine_and_reported_once(
    replicas: ReplicatedEngine, requests: list[Request], expected: list[Completion]
) -> None:
    reported: list[tuple[int, Completion]] = []
    signs: list[None] = []
    found = replicas.generate(requests, SAMPLING, lambda i, c: reported.append((i, c)), lambda: signs.append(None))
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)
    assert len({completion.token_ids for completion in expected}) == len(requests)
    assert dict(reported) == dict(enumerate(found)) and len(reported) == len(found)
    assert len(signs) >= max(len(completion.token_ids) for completion in found)
    assert replicas.generate(requests[4:5], SAMPLING)[0].token_ids == expected[4].token_ids
    assert replicas.generate([], SAMPLING) == []


def test_loglikelihoods_are_those_of_one_engine(replicas: ReplicatedEngine, requests: list[Request]) -> None:
    pairs: list[TokenPair] = [(request.prompt_ids[:-4], request.prompt_ids[-4:]) for request in requests]
    expected = open_engine("transformers", MODEL, OPTIONS).loglikelihood(pairs)
    found = replicas.loglikelihood(pairs)
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=1e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_unusable_requests_and_new_weights_are_refused(replicas: ReplicatedEngine, requests: list[Request]) -> None:
    unwanted = lambda *arguments: pytest.fail("computed")  # noqa: E731
    with pytest.raises(ValueError, match="request 9 has 5000 tokens"):
        replicas.generate([*requests, Request((5,) * 5000, 0)], SAMPLING, unwanted, unwanted)
    with pytest.raises(ValueError, match="pair 1: context and continuation"):
        replicas.loglikelihood([((5,), (6,)), ((5,), ())])
    with pytest.raises(ValueError, match="use a single engine"):
        replicas.load_weights(torch.nn.Linear(1, 1))


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="environments of processes are read from /proc")
def test_a_replica_is_started_with_its_threads_and_devices(replicas: ReplicatedEngine, children: Children) -> None:
    shared = [variables(child) for child in multiprocessing.active_children()]
    assert [each["OMP_NUM_THREADS"] for each in shared] == [str(max(1, torch.get_num_threads() // 2))] * 2
    before = dict(os.environ)
    replica = Replica("a replica", {"CUDA_VISIBLE_DEVICES": "7"}, "transformers", MODEL, OPTIONS)
    (child,) = children()
    deadline = time.monotonic() + 20
    while b"spawn_main" not in Path(f"/proc/{child.pid}/cmdline").read_bytes() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert variables(child)["CUDA_VISIBLE_DEVICES"] == "7"
    assert dict(os.environ) == before
    replica.kill()
    replica.join()


def variables(process: BaseProcess) -> dict[str, str]:
    entries = Path(f"/proc/{process.pid}/environ").read_text().rstrip("\0").split("\0")
    return dict(entry.split("=", 1) for entry in entries)


def test_a_killed_replica_is_named_and_what_was_reported_stays(
    requests: list[Request], expected: list[Completion], children: Children
) -> None:
    reported: dict[int, Completion] = {}
    engine = open_replicas()

    def on_finished(index: int, completion: Completion) -> None:
        reported[index] = completion
        if len(reported) == 3:
            (victim,) = [child for child in children() if "replica 2" in child.name]
            victim.kill()

    with pytest.raises(StageError, match=r"replica 2 of 2 died with exit code -9 .* run the same command again"):
        engine.generate(requests, SAMPLING, on_finished)
    assert 3 <= len(reported) < len(requests)
    for index, completion in reported.items():
        assert_same(completion, expected[index])
    assert not children(), "the other replica works for nobody"
    with pytest.raises(RuntimeError, match="have ended"):
        engine.generate(requests, SAMPLING)
    engine.close()


@pytest.mark.slow
def test_a_replica_that_raises_is_named_with_its_message(
    requests: list[Request], expected: list[Completion], children: Children
) -> None:
    """The last chunk is only handed out when an earlier one is finished, and that one has been reported."""
    reported: dict[int, Completion] = {}
    engine = open_replicas()
    with pytest.raises(RuntimeError, match=r"replica . of 2 failed: IndexError: index out of range"):
        engine.generate([*requests, Request((UNKNOWN_TOKEN,), 0)], SAMPLING, reported.__setitem__)
    assert len(reported) >= 2
    for index, completion in reported.items():
        assert_same(completion, expected[index])
    assert not children()


@pytest.mark.slow
def test_an_exception_of_the_caller_ends_the_replicas(requests: list[Request], children: Children) -> None:
    def on_finished(index: int, completion: Completion) -> None:
        raise OSError("no space left")

    engine = open_replicas()
    with pytest.raises(OSError, match="no space left"):
        engine.generate(requests, SAMPLING, on_finished)
    assert not children()


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_opened_is_told(tmp_path: Path, children: Children) -> None:
    (tmp_path / "config.json").write_bytes((MODEL / "config.json").read_bytes())
    with pytest.raises((StageError, RuntimeError), match=r"replica . of 2 failed: .*weights"):
        ReplicatedEngine("transformers", tmp_path, 2, OPTIONS)
    assert not children()


PARENT = """
import multiprocessing, sys
from pathlib import Path
from tasks.sampling.engine import EngineOptions, Request, SamplingParams
from tasks.sampling.replicas import ReplicatedEngine

if __name__ == "__main__":
    engine = ReplicatedEngine("transformers", Path(sys.argv[1]), 2, EngineOptions(64, "float32", batch_size=1))
    def tell(index, completion):
        print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    requests = [Request((5, 6), seed) for seed in range(10_000)]
    engine.generate(requests, SamplingParams(1.0, 1.0, 20, ()), tell)
"""


def test_replicas_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    (tmp_path / "parent.py").write_text(PARENT)
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, str(tmp_path / "parent.py"), str(MODEL)]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
    with parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2 and all(map(is_alive, pids))
        parent.send_signal(signal.SIGKILL)
        deadline = time.monotonic() + 20
        while any(map(is_alive, pids)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not any(map(is_alive, pids))


def is_alive(pid: int) -> bool:
    """An ended process that nobody has waited for, as may be in a container, is not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.mark.skipif(torch.cuda.device_count() >= 100, reason="there are as many devices")
def test_too_few_devices_are_told_before_anything_starts(children: Children) -> None:
    with pytest.raises(StageError, match=r"data_parallel=100 x tensor_parallel=1 takes 100 devices, and \d+ are"):
        ReplicatedEngine("transformers", MODEL, 100, replace(OPTIONS, device="cuda"))
    assert not children()


def test_devices_keep_the_names_that_the_process_was_given() -> None:
    assert visible_devices("", 2) == ["0", "1"]
    assert visible_devices("3, GPU-5,1", 3) == ["3", "GPU-5", "1"]
    assert visible_devices("3,1,-1,0", 2) == ["3", "1"]
    assert visible_devices("3", 0) == []


def test_each_replica_gets_a_run_of_the_visible_devices() -> None:
    assert device_groups(["0", "1", "2"], 2, 1) == ["0", "1"]
    assert device_groups(["3", "GPU-5", "1", "0"], 2, 2) == ["3,GPU-5", "1,0"]
    with pytest.raises(StageError, match="data_parallel=2 x tensor_parallel=2 takes 4 devices, and 3 are visible"):
        device_groups(["0", "1", "2"], 2, 2)


@pytest.mark.parametrize(
    ("num_items", "num_replicas", "batch_size", "size"),
    [
        (120, 8, 256, 15),  # all at once: an even share
        (2048, 8, 256, 256),
        (3000, 2, 256, 375),  # a quarter of the share is more than a batch
        (1000, 2, 256, 256),  # a batch is more than a quarter
        (1, 4, 256, 1),
        (0, 4, 256, 1),
    ],
)
def test_chunks(num_items: int, num_replicas: int, batch_size: int, size: int) -> None:
    assert chunk_size(num_items, num_replicas, batch_size) == size
