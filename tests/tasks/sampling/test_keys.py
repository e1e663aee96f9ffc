"""What of a generation enters a stage's key: what decides a sample, and the code of what computes it."""

import ast
from pathlib import Path

import pytest

from artifacts.keys import REPOSITORY
from tasks.calibrate import CalibrateConfig, calibrate
from tasks.evaluate import EvaluateConfig, evaluate
from tasks.grpo_train import GRPOTrainConfig, grpo_train
from tasks.runtime.execute import StageRun
from tasks.sampling.config import GenerationConfig

STAGES = [(calibrate, CalibrateConfig), (evaluate, EvaluateConfig), (grpo_train, GRPOTrainConfig)]
UNKEYED = {"gpu_memory_utilization": 0.5, "stall_seconds": 5.0, "stall_limit_seconds": 5000.0}
KEYED = {
    "engine": "vllm", "temperature": 0.3, "top_p": 0.5, "max_new_tokens": 5, "prompt_suffix": "!",
    "enable_thinking": True, "batch_size": 2,
}  # fmt: skip


@pytest.mark.parametrize(("stage", "kind"), STAGES)
def test_settings_inside_a_generation_are_keyed_or_not_one_by_one(stage, kind):
    whole = kind().keyed()
    for name, value in UNKEYED.items():
        assert kind(generation={name: value}).keyed() == whole
    for name, value in KEYED.items():
        assert kind(generation={name: value}).keyed() != whole, name
    assert EvaluateConfig(generation={"data_parallel": 2}).keyed() != EvaluateConfig().keyed()
    assert whole["generation"].keys() | UNKEYED.keys() == GenerationConfig.model_fields.keys()


@pytest.mark.parametrize(("stage", "kind"), STAGES)
def test_the_code_is_that_of_the_engine_and_of_the_kind(stage, kind):
    def files(**options) -> set[str]:
        return set(StageRun(stage, kind(**options), {}, Path("nowhere"), code=None).code.definitions)

    plain, vllm = files(), files(generation={"engine": "vllm"})
    ours, theirs = "tasks/sampling/transformers_engine.py", "tasks/sampling/vllm_engine.py"
    assert ours in plain and theirs not in plain
    assert theirs in vllm and ours not in vllm
    sandbox = "tasks/judging/sandbox.py"
    assert sandbox not in plain, "no program is judged"
    if stage is not calibrate:
        assert sandbox in files(kind="code")


@pytest.mark.parametrize(("stage", "kind"), STAGES)
def test_the_code_is_that_of_what_vllm_finds_by_our_entry_point(stage, kind):
    run = StageRun(stage, kind(generation={"engine": "vllm"}), {}, Path("nowhere"))
    plugin = "tasks/sampling/vllm_plugin.py"
    classes = {
        f"class {s.name}" for s in ast.parse((REPOSITORY / plugin).read_text()).body if isinstance(s, ast.ClassDef)
    }
    assert classes and classes <= set(run.definitions[plugin])
