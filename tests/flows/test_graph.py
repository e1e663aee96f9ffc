"""The union of branches: what is shared, what differs, and where a run stops."""

from __future__ import annotations

import pytest

from flows.branches import SECTIONS
from flows.config import ConfigError, apply_overrides
from flows.graph import build_graph, evaluation_roles
from flows.paper_recipes import PAPER_BENCHMARKS
from flows.recipes import demo, domain_alignment, qwen3_4b_w3g128


def stages(graph, name):  # type: ignore[no-untyped-def]
    return [node for node in graph.nodes.values() if node.stage.name == name]


def test_each_distinct_stage_is_there_once() -> None:
    graph = build_graph(demo())
    assert len(stages(graph, "base_model")) == 1
    assert len(stages(graph, "calibrate")) == 1, "both schemes share the calibration"
    assert len(stages(graph, "ptq_init")) == 4
    assert len(stages(graph, "kd_train")) == 2, "GRPO continues the KD student of the KD branch"
    assert len(stages(graph, "evaluate")) == 11
    assert graph.num_stages_unshared() > 2 * len(graph.nodes)


def test_inputs_come_before_their_stage() -> None:
    graph = build_graph(demo())
    seen: set[str] = set()
    for node in graph.nodes.values():
        assert set(node.inputs.values()) <= seen
        seen.add(node.id)


def test_labels_are_unique() -> None:
    labels = [node.label for node in build_graph(demo()).nodes.values()]
    assert len(labels) == len(set(labels))


def test_domain_alignment_is_four_branches_of_one_flow() -> None:
    graph = build_graph(domain_alignment())
    assert len(stages(graph, "calibrate")) == 2
    assert len(stages(graph, "ptq_init")) == 2
    assert len(stages(graph, "kd_train")) == 4
    sources = {(node.config.source, node.config.split) for node in stages(graph, "dataset")}
    assert {s for s, split in sources if split == "train"} == {"bundled", "bundled_stories"}


def test_until_cuts_what_comes_after() -> None:
    names = {node.stage.name for node in build_graph(demo(), until="ptq_init").nodes.values()}
    assert names == {"base_model", "dataset", "calibrate", "ptq_init"}
    names = {node.stage.name for node in build_graph(demo(), until="calibrate").nodes.values()}
    assert names == {"base_model", "dataset", "calibrate"}
    with pytest.raises(ConfigError, match="did you mean 'ptq_init'"):
        build_graph(demo(), until="ptq_int")


def test_a_changed_parameter_changes_only_what_depends_on_it() -> None:
    before = set(build_graph(demo()).nodes)
    after = build_graph(apply_overrides(demo(), ["W2G128 GPTQ+KD:kd_train.seed=5"]))
    changed = {node.role for identity, node in after.nodes.items() if identity not in before}
    assert changed == {"kd_train", "evaluate"}


def test_each_benchmark_is_a_data_set_and_an_evaluation_of_its_own() -> None:
    run = apply_overrides(
        demo().select(["W2G128 GPTQ*"]), ["benchmarks=[gpqa_diamond, gsm8k]", "benchmark_data=/copies"]
    )
    graph = build_graph(run)
    assert len(stages(graph, "evaluate")) == 3 * len(run.branches)
    roles = graph.roles["W2G128 GPTQ+KD"]
    pairs = evaluation_roles(roles)
    assert pairs == [
        ("evaluate", "test_data"),
        ("evaluate:gpqa_diamond", "test_data:gpqa_diamond"),
        ("evaluate:gsm8k", "test_data:gsm8k"),
    ]
    for evaluation, data in pairs:
        node = graph.nodes[roles[evaluation]]
        assert node.inputs == {"checkpoint": roles["kd_train"], "data": roles[data]}
        assert node.config.generation.max_new_tokens == 192, "the branch's own settings"
    gpqa, gsm8k = (graph.nodes[roles[evaluation]].config for evaluation, _ in pairs[1:])
    assert (gpqa.name, gpqa.kind, gpqa.generation.prompt_suffix) == ("gpqa_diamond", "choice", "")
    assert (gsm8k.name, gsm8k.kind) == ("gsm8k", "math") and "\\boxed{}" in gsm8k.generation.prompt_suffix
    data = graph.nodes[roles["test_data:gsm8k"]].config
    assert (data.benchmark, data.source) == ("gsm8k", "/copies")
    assert "evaluate:gsm8k" not in build_graph(run, until="kd_train").roles["W2G128 GPTQ+KD"]


def test_benchmarks_come_from_the_hub_without_a_folder() -> None:
    graph = build_graph(qwen3_4b_w3g128().select(["BF16"]))
    assert {node.config.source for node in stages(graph, "dataset")} == {"hub"}
    assert {node.config.benchmark for node in stages(graph, "dataset")} == set(PAPER_BENCHMARKS)


@pytest.mark.parametrize(
    ("until", "names"),
    [
        ("base_model", {"base_model"}),
        ("train_data", {"dataset"}),
        ("dataset", {"dataset"}),
        ("sft_train", {"base_model", "dataset", "calibrate", "ptq_init", "sft_train"}),
        ("kd_train", {"base_model", "dataset", "calibrate", "ptq_init", "kd_train"}),
        ("evaluate", {node.stage.name for node in build_graph(demo()).nodes.values()}),
    ],
)
def test_until_keeps_any_stage_and_what_it_needs(until: str, names: set[str]) -> None:
    graph = build_graph(demo(), until)
    assert {node.stage.name for node in graph.nodes.values()} == names
    for node in graph.nodes.values():
        assert set(node.inputs.values()) <= set(graph.nodes)
    assert all(identity in graph.nodes for roles in graph.roles.values() for identity in roles.values())


def test_until_a_stage_that_runs_beside_the_others() -> None:
    run = apply_overrides(demo().select(["W2G128 GPTQ+KD"]), ["teacher_topk={}"])
    graph = build_graph(run, "teacher_topk")
    assert {node.stage.name for node in graph.nodes.values()} == {"base_model", "dataset", "teacher_topk"}
    kd = stages(build_graph(run), "kd_train")[0]
    assert set(kd.inputs) == {"student", "teacher", "data", "teacher_topk", "validation"}


def test_until_a_stage_that_no_branch_has() -> None:
    with pytest.raises(ConfigError, match="no selected branch has a stage 'grpo_train'"):
        build_graph(demo().select(["W2G128 GPTQ+KD"]), "grpo_train")


def test_every_input_of_every_stage_comes_from_a_slot() -> None:
    """What a stage's file declares is all that the graph knows; forgetting a part is told here."""
    given = {"base", "model"}
    for name, stage in SECTIONS.items():
        assert set(stage.reads) == {*stage.required, *stage.optional}, f"{name}: every input has a slot"
        given |= {name, *stage.gives}
    for name, stage in SECTIONS.items():
        assert set(stage.reads.values()) <= given, f"{name} reads a slot that nothing gives"
