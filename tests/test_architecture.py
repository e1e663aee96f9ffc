"""The house rules that can be read from the imports: data flows one way, and heavy packages stay in their rooms."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
ROOMS = ("flows", "tasks", "quant", "artifacts")
LEAVES = ("data", "training", "sampling", "judging", "reporting", "evaluation", "calibration")
MOST_LINES = 300


def sources() -> list[Path]:
    return [
        p
        for room in ROOMS
        for p in sorted((REPOSITORY / room).rglob("*.py"))
        if "store" not in p.relative_to(REPOSITORY).parts
    ]


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> set[str]:
    """Every module imported anywhere in the file, also inside functions; `from a import b` counts as a and a.b."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def first_party(names: set[str]) -> set[str]:
    return {name for name in names if name.split(".")[0] in ROOMS}


def tops(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def test_the_rooms_are_found() -> None:
    assert {module_name(p).split(".")[0] for p in sources()} == set(ROOMS)
    assert "tasks.runtime.stage" in imports(REPOSITORY / "tasks" / "runtime" / "execute.py")


@pytest.mark.parametrize("path", sources(), ids=module_name)
def test_dependencies_point_one_way(path: Path) -> None:
    name, used = module_name(path), imports(path)
    room = name.split(".")[0]
    allowed = {
        "artifacts": {"artifacts"},
        "quant": {"quant"},
        "tasks": {"tasks", "quant", "artifacts"},
        "flows": set(ROOMS),
    }[room]
    assert tops(first_party(used)) <= allowed, f"{name} imports {first_party(used)}"


@pytest.mark.parametrize("path", [p for p in sources() if "quant" in p.parts], ids=module_name)
def test_quant_needs_torch_only(path: Path) -> None:
    import sys

    outside = {t for t in tops(imports(path)) if t not in sys.stdlib_module_names} - {"quant"}
    assert outside <= {"torch", "safetensors"}, f"{module_name(path)} imports {outside}"


@pytest.mark.parametrize("path", [p for p in sources() if "artifacts" in p.parts], ids=module_name)
def test_artifacts_needs_the_standard_library_only(path: Path) -> None:
    import sys

    assert {t for t in tops(imports(path)) if t not in sys.stdlib_module_names} <= {"artifacts"}


@pytest.mark.parametrize("path", sources(), ids=module_name)
def test_heavy_packages_stay_in_their_rooms(path: Path) -> None:
    name, used = module_name(path), tops(imports(path))
    if "prefect" in used:
        assert name.startswith("flows.") or name == "tasks.runtime.prefect_tasks"
    if "lighteval" in used:
        assert name.startswith("tasks.evaluation.")
    if "vllm" in used:
        assert name in ("tasks.sampling.vllm_engine", "tasks.sampling.vllm_plugin")


MODULE_NAMES = re.compile(r"_proj\b|layernorm|lm_head|embed_tokens|self_attn|model\.layers|\b[qk]_norm\b")


@pytest.mark.parametrize("path", [p for p in sources() if p != REPOSITORY / "quant" / "decoder.py"], ids=module_name)
def test_one_file_knows_the_module_names_of_the_architectures(path: Path) -> None:
    tree = ast.parse(path.read_text())
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}  # docstrings
    names = [node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    strings = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in prose)
    names += [str(node.value) for node in strings if " " not in str(node.value)]  # messages may speak of them
    assert not [name for name in names if MODULE_NAMES.search(name)], "take it from quant/decoder.py"


QUANT_ROOMS = ("grids", "transforms", "student", "calibration", "methods")


@pytest.mark.parametrize("path", [p for p in sources() if p.parent.name in QUANT_ROOMS], ids=module_name)
def test_rooms_of_quant_know_those_before_them(path: Path) -> None:
    room = path.parent.name
    before = QUANT_ROOMS[: QUANT_ROOMS.index(room) + 1]
    used = {name.split(".")[1] for name in first_party(imports(path)) if name.startswith("quant.")}
    assert used <= {"decoder", *before}, f"{room} imports {used}"


def test_the_decoder_s_names_need_nothing() -> None:
    used = imports(REPOSITORY / "quant" / "decoder.py")
    assert not first_party(used) and not tops(used) & {"torch", "transformers"}


def stage_modules() -> set[str]:
    return {
        module_name(p)
        for p in (REPOSITORY / "tasks").glob("*.py")
        if "stage" in p.read_text() and "@stage(" in p.read_text()
    }


@pytest.mark.parametrize("path", sources(), ids=module_name)
def test_no_stage_imports_a_stage(path: Path) -> None:
    name = module_name(path)
    if not name.startswith("tasks."):
        return
    stages = stage_modules() - {"tasks.runtime.stage", name}
    assert not (imports(path) & stages), f"{name} imports a stage: {imports(path) & stages}"


@pytest.mark.parametrize(
    "path", [p for p in sources() if p.parent.name in LEAVES and p.parent.parent.name == "tasks"], ids=module_name
)
def test_leaf_packages_know_no_other_leaf_but_what_they_are_built_on(path: Path) -> None:
    """Training samples and judges, evaluation puts sampling and judging behind lighteval, calibration samples.

    Engines open checkpoints, whose format is tasks.checkpoints.models' alone.
    """
    name = module_name(path)
    own = ".".join(name.split(".")[:2])
    allowed = {own, "tasks.runtime.stage", "tasks.runtime.bounds", "tasks.runtime.processes"}
    if own == "tasks.sampling":
        allowed |= {"tasks.checkpoints", "tasks.runtime.machine"}
    if own == "tasks.calibration":
        allowed |= {"tasks.sampling", "tasks.data"}
    if own == "tasks.evaluation":
        allowed |= {"tasks.sampling", "tasks.judging", "tasks.data", "tasks.checkpoints", "tasks.runtime.machine"}
    if own == "tasks.judging":
        allowed |= {"tasks.data.boxes"}
    if own == "tasks.training":
        allowed |= {"tasks.sampling", "tasks.judging", "tasks.data", "tasks.checkpoints"}
    if own == "tasks.reporting":
        allowed |= {"tasks.evaluation.statistics", "tasks.training.config"}
    used = {i for i in first_party(imports(path)) if i.startswith("tasks.")}
    strangers = {i for i in used if not any(i == a or i.startswith(a + ".") for a in allowed)}
    assert not strangers, f"{name} imports {strangers}"


@pytest.mark.parametrize("path", sources(), ids=module_name)
def test_files_stay_small(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MOST_LINES, "split it: a file is one idea"


@pytest.mark.parametrize("path", sources(), ids=module_name)
def test_nothing_pickled_is_loaded(path: Path) -> None:
    used = imports(path)
    assert not used & {"pickle", "dill", "cloudpickle", "joblib"}
    assert "torch.load(" not in path.read_text()
