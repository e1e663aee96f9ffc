"""Overrides and validation: what a user types, and what they are told when it does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from flows.branches import BranchConfig
from flows.config import ConfigError, RunConfig, apply_overrides, nearest
from flows.recipes import RECIPES, configured, demo, qwen3_4b_w3g128, tiny_w2g128
from quant.methods.options import AWQOptions, GPTQOptions, QuaRotOptions
from tasks.base_model import BaseModelConfig
from tasks.evaluation.config import UNSAMPLED

QAT = "Reasoning-QAT W2G128"


def test_an_override_reaches_every_branch_that_has_the_section() -> None:
    run = apply_overrides(demo(), ["kd_train.learning_rate=1e-5", "evaluate.seeds=[1, 2]"])
    rates = {label: b.kd_train.learning_rate for label, b in run.branches.items() if b.kd_train}
    assert rates and set(rates.values()) == {1e-5}
    assert all(b.evaluate is not None and b.evaluate.seeds == (1, 2) for b in run.branches.values())


def test_an_override_can_name_one_branch() -> None:
    run = apply_overrides(demo(), ["W3G128 GPTQ+KD:kd_train.steps=11"])
    steps = {label: b.kd_train.steps for label, b in run.branches.items() if b.kd_train}
    assert steps.pop("W3G128 GPTQ+KD") == 11
    assert 11 not in steps.values()


def test_an_override_reaches_the_options_of_a_method() -> None:
    run = apply_overrides(tiny_w2g128(), ["ptq_init.method=awq", "ptq_init.awq.clip=false"])
    ptq_init = run.branches[QAT].ptq_init
    assert ptq_init is not None and ptq_init.awq == AWQOptions(clip=False) and ptq_init.gptq is None
    run = apply_overrides(tiny_w2g128(), ["ptq_init.method=quarot", "ptq_init.quarot.gptq.act_order=true"])
    ptq_init = run.branches[QAT].ptq_init
    assert ptq_init is not None and ptq_init.quarot == QuaRotOptions(gptq=GPTQOptions(act_order=True))


def test_null_skips_a_stage() -> None:
    run = apply_overrides(tiny_w2g128(), [f"{QAT}:grpo_train=null"])
    assert run.branches[QAT].grpo_train is None
    assert run.branches[QAT].kd_train is not None


def test_model_is_short_for_the_base_model() -> None:
    run = apply_overrides(tiny_w2g128(), ["model=/somewhere"])
    assert {b.base_model.model for b in run.branches.values() if b.base_model} == {"/somewhere"}


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("kd_train.stepz=3", "did you mean 'steps'"),
        ("kd_trian.steps=3", "did you mean 'kd_train'"),
        ("evaluate.engine=vllm", "did you mean 'generation.engine'"),
        ("scheme=W3", "did you mean 'ptq_init.scheme'"),
        ("engine=vllm", "did you mean '"),
        ("test_data.source=", "test_data.source: needs a value"),
        ("model=", "base_model.model: needs a value"),
        ("evaluate.seeds=42", r"evaluate.seeds: write a list, \[a, b\] \(given: 42\)"),
        ("benchmarks=gsm8k", r"benchmarks: write a list"),
        ("kd_train=3", "kd_train: a section: set one of its fields"),
        ("kd_train.steps=many", "kd_train.steps"),
        ("kd_train.steps", "section.field=value"),
        ("W2G128 KD:kd_train.steps=3", "unknown branch"),
        ("pretrain.loop.steps=3", "no selected branch has a stage 'pretrain'"),
        ("grpo_train.batch_size=7", "multiple of group_size"),
        ("kd_train.steps.more=7", "is a value"),
        ("benchmarks=[math500]", "'math_500'"),
        ("benchmarks=[gsm8k, gsm8k]", "repeat"),
        ("evaluate.kind=chioce", "'choice'"),
        ("W2G128 GPTQ:ptq_init.gptq.dampling=1", "did you mean 'damping'"),
        ("W2G128 GPTQ:ptq_init.gptq.damping=2", "usual is 0.01"),
        ("W2G128 GPTQ:ptq_init.awq.clip=false", "another method than 'gptq'"),
    ],
)
def test_what_does_not_fit_is_told_with_the_remedy(override: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        apply_overrides(demo(), [override])


def test_unknown_recipe_and_branch() -> None:
    with pytest.raises(ConfigError, match="did you mean 'tiny_w2g128'"):
        configured("tiny_w2g12", [], [], None)
    with pytest.raises(ConfigError, match="no branch is called"):
        configured("demo", [], ["W5G128"], None)


def test_a_branch_lacks_nothing_that_its_stages_need() -> None:
    kd = demo().branches["W2G128 GPTQ+KD"]
    with pytest.raises(ValidationError, match="train_data is missing"):
        BranchConfig.model_validate({**kd.model_dump(), "train_data": None})
    with pytest.raises(ValidationError, match="exactly one of"):
        BranchConfig.model_validate({**kd.model_dump(), "base_model": None})
    with pytest.raises(ValidationError, match="test_data is missing: evaluate reads it; or name benchmarks"):
        BranchConfig.model_validate({**kd.model_dump(), "test_data": None})
    with pytest.raises(ValidationError, match="evaluate is missing: the benchmarks"):
        BranchConfig.model_validate({**kd.model_dump(), "evaluate": None, "benchmarks": ["gsm8k"]})
    named_alike = kd.evaluate.model_copy(update={"name": "gsm8k"}).model_dump() if kd.evaluate else {}
    with pytest.raises(ValidationError, match="'gsm8k' is also a benchmark's"):
        BranchConfig.model_validate({**kd.model_dump(), "evaluate": named_alike, "benchmarks": ["gsm8k"]})
    unsampled = {"kind": "loglikelihood", "seeds": [1], "generation": UNSAMPLED}
    with pytest.raises(ValidationError, match="gsm8k is sampled with evaluate's settings"):
        BranchConfig.model_validate({**kd.model_dump(), "evaluate": unsampled, "benchmarks": ["piqa", "gsm8k"]})
    BranchConfig.model_validate({**kd.model_dump(), "evaluate": unsampled, "benchmarks": ["piqa"]})


def test_comparisons_name_branches() -> None:
    branch = BranchConfig(base_model=BaseModelConfig())
    with pytest.raises(ValidationError, match="are no branches"):
        RunConfig(name="x", branches={"a": branch}, comparisons=(("a", "b"),))


def test_selecting_branches_drops_comparisons_with_the_others() -> None:
    run = demo().select(["w3g128*"])
    assert all(label.startswith("W3G128") for label in run.branches)
    assert run.reference is None
    assert run.comparisons and all(a.startswith("W3") and b.startswith("W3") for a, b in run.comparisons)


def test_every_recipe_is_complete_and_described() -> None:
    for name, make in RECIPES.items():
        run = make()
        assert run.name == name and run.description and run.branches


def test_paper_recipes_have_the_tables_hyperparameters() -> None:
    """Tables 6 and 7 of the paper."""
    branches = qwen3_4b_w3g128().branches
    for start, rate in (("RTN", 2e-5), ("GPTQ", 1e-6)):
        for objective in ("SFT", "KD"):
            branch = branches[f"{start}+{objective}"]
            config = branch.sft_train or branch.kd_train
            assert config is not None
            assert (config.learning_rate, config.warmup_steps, config.steps) == (rate, 180, 6000)
            assert (config.batch_size, config.micro_batch_size, config.betas) == (32, 8, (0.9, 0.95))
        grpo = branches[f"{start}+KD+GRPO"].grpo_train
        assert grpo is not None
        assert (grpo.learning_rate, grpo.warmup_steps, grpo.steps, grpo.batch_size) == (5e-7, 8, 250, 64)
        assert (grpo.group_size, grpo.generation.max_new_tokens, grpo.betas) == (8, 32768, (0.9, 0.95))
        assert grpo.batch_size // grpo.micro_batch_size == 4
    evaluation = branches["BF16"].evaluate
    assert evaluation is not None
    asked = evaluation.generation
    assert (asked.temperature, asked.top_p, asked.max_new_tokens) == (0.6, 0.95, 32768)
    assert len(evaluation.seeds) == 3


def test_nearest_names_all_when_nothing_is_near() -> None:
    assert nearest("zzz", ["alpha", "beta"]) == "valid: alpha, beta"


def test_the_order_of_overrides_does_not_matter() -> None:
    """Fewer steps than the recipe's warmup are refused, unless the warmup is lowered too, before or after."""
    with pytest.raises(ConfigError, match="warmup_steps"):
        apply_overrides(tiny_w2g128(), ["kd_train.steps=3"])
    both = ["kd_train.steps=3", "kd_train.warmup_steps=1"]
    assert apply_overrides(tiny_w2g128(), both) == apply_overrides(tiny_w2g128(), both[::-1])


def test_a_group_size_that_does_not_divide_is_told_before_any_compute() -> None:
    from flows.config import ConfigError
    from flows.stage_runs import check_request
    from tasks.runtime.stage import StageError

    check_request("tiny_w2g128", [], [], None, [])
    with pytest.raises(StageError, match="64"):
        check_request("tiny_w2g128", ["ptq_init.scheme=W2G96"], [], None, [])
    with pytest.raises(ConfigError, match="did you mean 'gptq'"):
        check_request("tiny_w2g128", ["ptq_init.method=gtpq"], [], None, [])
    with pytest.raises(StageError, match="/nowhere"):
        check_request("tiny_w2g128", ["model=/nowhere"], [], None, [])


def test_missing_benchmark_data_is_told_before_any_compute(tmp_path: Path) -> None:
    from flows.stage_runs import check_request
    from tasks.runtime.stage import StageError

    copy = tmp_path / "gsm8k.jsonl"
    asked = ["benchmarks=[gsm8k]", f"benchmark_data={tmp_path}"]
    with pytest.raises(StageError, match=r"no copy of benchmark gsm8k: put gsm8k\.jsonl .*revision 740312a"):
        check_request("tiny_w2g128", asked, [], None, [])
    copy.write_text('{"question": "1+1?", "answer": "#### 2"}\n')
    check_request("tiny_w2g128", asked, [], None, [])


def test_the_report_names_the_command_that_runs_a_row_again() -> None:
    from flows.reasoning_qat import again

    assert again("demo", ["a.b=[1, 2]"], None) == "reasoning-qat run demo --set 'a.b=[1, 2]' --branch BRANCH"


def test_only_a_checkpoint_can_be_evaluated_by_its_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from artifacts.store import Store
    from flows.recipes import configured

    monkeypatch.setenv("REASONING_QAT_STORE", str(tmp_path / "store"))
    store = Store()
    refs = {}
    for kind in ("dataset", "checkpoint"):
        folder = store.new_folder()
        (folder / "file").write_text(kind)
        payload = {"stage": kind, "version": "1", "code": "", "config": {}, "inputs": {}}
        refs[kind] = store.commit(folder, kind, store.key(payload), payload, {})
    assert len(configured("tiny_w2g128", [], [], refs["checkpoint"].short).branches) == 1
    with pytest.raises(ConfigError, match=r"dataset:\w+ is no checkpoint"):
        configured("tiny_w2g128", [], [], refs["dataset"].short)
