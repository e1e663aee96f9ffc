"""Nothing runs in a stage body that its key does not know: what executes is traced and compared with what was found."""

from __future__ import annotations

import ast
import functools
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from artifacts.classes import INFRASTRUCTURE
from artifacts.keys import REPOSITORY
from artifacts.modules import FIRST_PARTY
from artifacts.refs import Ref
from artifacts.store import Store
from tasks.base_model import base_model
from tasks.calibrate import calibrate
from tasks.data.bundled_tokenizer import build_tokenizer
from tasks.dataset import dataset
from tasks.evaluate import evaluate
from tasks.grpo_train import grpo_train
from tasks.kd_train import kd_train
from tasks.pretrain import pretrain
from tasks.ptq_init import ptq_init
from tasks.runtime.execute import StageRun, execute
from tasks.runtime.stage import Stage
from tasks.sft_train import sft_train
from tasks.teacher_topk import teacher_topk

Executed = set[tuple[str, int]]
"""(file relative to the repository, first line) of functions."""


@contextmanager
def traced() -> Iterator[Executed]:
    found: set[tuple[str, int]] = set()

    def profile(frame: Any, event: str, _argument: Any) -> None:
        if event == "call" and frame.f_code.co_name != "<module>":
            found.add((frame.f_code.co_filename, frame.f_code.co_firstlineno))

    executed: Executed = set()
    threading.setprofile(profile)
    sys.setprofile(profile)
    try:
        yield executed
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
        for file, line in found:
            path = Path(file)
            if path.is_relative_to(REPOSITORY) and path.relative_to(REPOSITORY).parts[0] in FIRST_PARTY:
                executed.add((path.relative_to(REPOSITORY).as_posix(), line))


def body_of(run: StageRun) -> Executed:
    """What the stage's body executes when it runs again."""
    executed: Executed = set()

    @functools.wraps(run.stage.body)
    def body(*given: Any, **inputs: Any) -> Any:
        with traced() as found:
            metrics = run.stage.body(*given, **inputs)
        executed.update(found)
        return metrics

    execute(replace(run, stage=replace(run.stage, body=body), force=True))
    return executed


@functools.cache
def _lines(path: str) -> dict[int, list[str]]:
    """The labels that a line of a file may stand under."""
    labels: dict[int, list[str]] = {}
    for statement in ast.parse((REPOSITORY / path).read_text()).body:
        names = []
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            names = [f"function {statement.name}"]
        elif isinstance(statement, ast.ClassDef):
            names = [f"class {statement.name}"]
        elif isinstance(statement, ast.Assign | ast.AnnAssign):
            names = [f"constant {n.id}" for n in ast.walk(statement) if isinstance(n, ast.Name)]
        first = min([statement.lineno, *(d.lineno for d in getattr(statement, "decorator_list", []))])
        for line in range(first, (statement.end_lineno or first) + 1):
            labels[line] = [*names, "module statements"]
    return labels


def unknown(run: StageRun, executed: Executed) -> list[str]:
    """What was executed and is not in the code of the run."""
    assert run.code is not None
    infrastructure = tuple(f"{place.replace('.', '/')}/" for place in INFRASTRUCTURE)
    missing = []
    for path, line in sorted(executed):
        reached = {label.partition("[")[0] for label in run.code.definitions.get(path, ())}
        if not path.startswith(infrastructure) and not reached & set(_lines(path)[line]):
            missing.append(f"{path}:{line} {_lines(path)[line][0]}")
    return missing


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Trials:
    """Runs stages in a store; each twice, so that what is traced is the body and not the imports."""

    def __init__(self, folder: Path) -> None:
        self.store = Store(folder / "store")
        self.folder = folder

    def ref(self, stage: Stage, config: dict[str, Any], **inputs: Ref) -> Ref:
        return execute(self.run(stage, config, **inputs)).ref

    def run(self, stage: Stage, config: dict[str, Any], **inputs: Ref) -> StageRun:
        made = stage.config_type.model_validate(config)
        digest = stage.source_digest(made) if stage.source_digest else None
        return StageRun(stage, made, inputs, self.store.root, source_digest=digest)

    def unknown(self, stage: Stage, config: dict[str, Any], **inputs: Ref) -> list[str]:
        run = self.run(stage, config, **inputs)
        execute(run)
        executed = body_of(run)
        assert any(path.startswith("tasks/") for path, _ in executed), "nothing was traced"
        return unknown(run, executed)

    @functools.cached_property
    def base(self) -> Ref:
        tokenizer = build_tokenizer()
        torch.manual_seed(0)
        config = Qwen3Config(
            vocab_size=-(-len(tokenizer) // 64) * 64,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            initializer_range=0.1,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
        )
        Qwen3ForCausalLM(config).bfloat16().save_pretrained(self.folder / "model")
        tokenizer.save_pretrained(self.folder / "model")
        return self.ref(base_model, {"model": str(self.folder / "model")})

    @functools.cached_property
    def data(self) -> Ref:
        return self.ref(dataset, {"num_examples": 8})

    @functools.cached_property
    def calibration(self) -> Ref:
        return self.ref(calibrate, CALIBRATION, base=self.base, data=self.data)

    @functools.cached_property
    def student(self) -> Ref:
        return self.ref(ptq_init, PTQ["gptq"], base=self.base, calibration=self.calibration)


CALIBRATION = {"responses": "given", "num_sequences": 4, "sequence_length": 64}
PTQ: dict[str, dict[str, Any]] = {
    "rtn": {"scheme": "W3G32", "method": "rtn"},
    "gptq": {"scheme": "W3G32", "method": "gptq"},
    "awq": {"scheme": "W4G32", "method": "awq"},
    "quarot": {"scheme": "W4A4KV4", "method": "quarot"},
    "flatquant": {"scheme": "W4A4KV4", "method": "flatquant", "flatquant": {"epochs": 1}},
}
SHORT = {"max_new_tokens": 8}
STEPS = {"steps": 2, "warmup_steps": 1, "batch_size": 4, "micro_batch_size": 2, "checkpoint_every": 1}


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> Trials:
    return Trials(tmp_path_factory.mktemp("trials"))


@pytest.mark.parametrize("method", PTQ)
def test_ptq_init(trials: Trials, method: str) -> None:
    assert trials.unknown(ptq_init, PTQ[method], base=trials.base, calibration=trials.calibration) == []


def test_base_model_and_dataset(trials: Trials, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "1+1?", "response": "2", "answer": "2"}\n' * 3)
    assert trials.unknown(base_model, {"model": str(trials.store.path(trials.base))}) == []
    assert trials.unknown(dataset, {"num_examples": 8}) == []
    assert trials.unknown(dataset, {"source": str(file)}) == []


@pytest.mark.parametrize("stage", [kd_train, sft_train, teacher_topk], ids=lambda stage: stage.name)
def test_training(trials: Trials, stage: Stage) -> None:
    given = {"data": trials.data}
    given |= {"teacher": trials.base} if "teacher" in stage.required else {}
    given |= {"student": trials.student} if "student" in stage.required else {}
    config = STEPS if "student" in given else {"k": 8}
    assert trials.unknown(stage, config, **given) == []


@pytest.mark.parametrize(
    "stage, config",
    [
        (calibrate, {"num_sequences": 2, "sequence_length": 32, "generation": SHORT}),
        (grpo_train, {**STEPS, "group_size": 2, "generation": SHORT}),
        (evaluate, {"name": "bundled", "seeds": (1,), "generation": SHORT}),
    ],
    ids=lambda part: getattr(part, "name", ""),
)
def test_sampling(trials: Trials, stage: Stage, config: dict[str, Any]) -> None:
    model = {"calibrate": "base", "grpo_train": "student", "evaluate": "checkpoint"}[stage.name]
    inputs = {model: trials.base if stage is calibrate else trials.student, "data": trials.data}
    assert trials.unknown(stage, config, **inputs) == []


def test_pretrain(trials: Trials) -> None:
    loop = {"steps": 2, "learning_rate": 0.01, "warmup_steps": 1, "batch_size": 4, "micro_batch_size": 2}
    config = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_layers": 2,
        "num_heads": 2,
        "head_dim": 32,
        "loop": loop,
    }
    assert trials.unknown(pretrain, config) == []


GENERATION = {"generation": {"engine": "transformers"}}
ENGINE, METHODS, JUDGE = "tasks/sampling/vllm_engine.py", "quant/methods/", "tasks/judging/judge.py"


@pytest.mark.parametrize(
    "stage, config, reached, left_out",
    [
        (
            ptq_init,
            {"method": "gptq"},
            ["quant/methods/gptq.py"],
            ["quant/methods/awq.py", "quant/methods/flatquant.py"],
        ),
        (ptq_init, {"method": "awq"}, ["quant/methods/awq.py"], ["quant/methods/gptq.py", JUDGE]),
        (ptq_init, PTQ["quarot"], ["quant/methods/quarot.py", "quant/methods/gptq.py"], ["quant/methods/awq.py"]),
        (kd_train, {}, ["tasks/training/losses.py"], [JUDGE, METHODS, "tasks/sampling/", "tasks/evaluation/"]),
        (sft_train, {}, ["tasks/training/losses.py"], [JUDGE, METHODS, "tasks/sampling/", "tasks/evaluation/"]),
        (calibrate, GENERATION, ["tasks/sampling/transformers_engine.py"], [ENGINE, JUDGE, METHODS]),
        (calibrate, {"generation": {"engine": "vllm"}}, [ENGINE], ["tasks/sampling/transformers_engine.py", JUDGE]),
        (evaluate, {"name": "x", **GENERATION}, [JUDGE], [ENGINE, METHODS, "tasks/training/"]),
        (grpo_train, GENERATION, [JUDGE], [ENGINE, METHODS]),
        (dataset, {}, ["tasks/data/making.py"], [JUDGE, "tasks/sampling/", "tasks/training/", "quant/"]),
    ],
    ids=lambda part: getattr(part, "name", ""),
)
def test_a_stage_reaches_what_its_configuration_chooses(
    stage: Stage, config: dict[str, Any], reached: list[str], left_out: list[str]
) -> None:
    """One edit in AWQ leaves every GPTQ start a hit; one in the judge concerns evaluation and GRPO."""
    run = StageRun(stage, stage.config_type.model_validate(config), {}, Path("unused"))
    assert set(reached) <= set(run.definitions)
    assert [path for path in run.definitions if path.startswith(tuple(left_out))] == []


@pytest.mark.parametrize("stage", [kd_train, sft_train, grpo_train], ids=lambda stage: stage.name)
def test_how_often_a_state_is_saved_changes_no_bit_and_no_key(trials: Trials, stage: Stage) -> None:
    given = {"student": trials.student, "data": trials.data}
    given |= {"teacher": trials.base} if stage is kd_train else {}
    more = {"group_size": 2, "generation": SHORT} if stage is grpo_train else {}
    refs, keys = set(), set()
    for every in (1, 2, 7):
        run = trials.run(stage, {**STEPS, **more, "steps": 3, "checkpoint_every": every}, **given)
        keys.add(trials.store.key(run.payload()))
        refs.add(execute(replace(run, force=True)).ref)
    assert len(keys) == len(refs) == 1


def test_the_trace_sees_what_a_key_does_not_know(trials: Trials) -> None:
    run = trials.run(dataset, {"num_examples": 8})
    assert run.code is not None
    execute(run)
    executed = body_of(run)
    some = "tasks/data/bundled_problems.py"
    less = {path: labels for path, labels in run.code.definitions.items() if path != some}
    assert any(
        found.startswith(some) for found in unknown(replace(run, code=replace(run.code, definitions=less)), executed)
    )
