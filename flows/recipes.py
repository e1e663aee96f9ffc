"""Complete configurations as functions.  A recipe is a run: named branches that share every stage they can."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from artifacts.store import Store
from flows.branches import BranchConfig
from flows.config import ConfigError, RunConfig, apply_overrides, nearest
from flows.paper_recipes import paper_ladder, paper_w4a4kv4
from flows.tiny_recipes import ladder_comparisons, tiny_branch, tiny_ladder, tiny_methods, two_bit_choices
from tasks.pretrain import PretrainConfig

RECIPES: dict[str, Callable[[], RunConfig]] = {}


def recipe(make: Callable[[], RunConfig]) -> Callable[[], RunConfig]:
    """Register a recipe under its function's name."""
    RECIPES[make.__name__] = make
    return make


@recipe
def demo() -> RunConfig:
    return RunConfig(
        name="demo",
        description="accuracy ladder of the bundled model at W2G128 and W3G128",
        branches={"BF16": tiny_branch(), **tiny_ladder("W2G128"), **tiny_ladder("W3G128")},
        reference="BF16",
        comparisons=(*ladder_comparisons("W2G128"), *ladder_comparisons("W3G128")),
    )


@recipe
def tiny_w2g128() -> RunConfig:
    return _tiny("tiny_w2g128", "W2G128")


@recipe
def tiny_w3g128() -> RunConfig:
    return _tiny("tiny_w3g128", "W3G128")


@recipe
def tiny_w4a4kv4() -> RunConfig:
    return _tiny("tiny_w4a4kv4", "W4A4KV4", "FlatQuant")


def _tiny(name: str, scheme: str, start: str = "GPTQ") -> RunConfig:
    branch = tiny_branch(scheme, method=start.lower(), kd=True, grpo=True)
    return RunConfig(
        name=name,
        description=f"bundled model, {scheme}: {start} -> KD -> GRPO, beside BF16",
        branches={"BF16": tiny_branch(), f"Reasoning-QAT {scheme}": branch},
        reference="BF16",
    )


@recipe
def domain_alignment() -> RunConfig:
    """Calibration text x KD data, each matched (problems) or mismatched (stories), as in the paper's Table 3."""
    domains = {"matched": "bundled", "mismatched": "bundled_stories"}
    branches = {
        f"calibration {c}, KD {k}": tiny_branch("W2G128", calibration=domains[c], kd=True, kd_data=domains[k])
        for c in domains
        for k in domains
    }
    return RunConfig(
        name="domain_alignment",
        description="bundled model, W2G128: calibration x KD data, each matched or mismatched (Table 3)",
        branches=branches,
        reference="calibration matched, KD matched",
    )


@recipe
def ptq_methods() -> RunConfig:
    """The PTQ rows of the paper's Table 4, without training."""
    methods = {label: b for s in ("W3G128", "W2G128", "W4A4KV4") for label, b in tiny_methods(s).items()}
    return RunConfig(
        name="ptq_methods",
        description="bundled model: the PTQ methods at W3G128, W2G128 and W4A4KV4 (Table 4)",
        branches={"BF16": tiny_branch(), **methods},
        reference="BF16",
        comparisons=tuple((label, f"{label.split()[0]} RTN") for label in methods if not label.endswith(" RTN")),
    )


@recipe
def w2_choices() -> RunConfig:
    """What the 2-bit defaults were chosen by."""
    branches = two_bit_choices()
    reference = next(label for label in branches if label.endswith("frozen scales"))
    return RunConfig(
        name="w2_choices",
        description="bundled model, W2: grid, clip and group of the GPTQ start, and the scales in KD",
        branches=branches,
        reference=reference,
    )


@recipe
def zero_rl() -> RunConfig:
    """GRPO straight from PTQ against GRPO after a cold start (the paper's Table 2)."""
    return RunConfig(
        name="zero_rl",
        description="bundled model, W2G128: GRPO straight from RTN beside RTN -> KD -> GRPO (Table 2)",
        branches={
            "BF16": tiny_branch(),
            "RTN": tiny_branch("W2G128", method="rtn"),
            "RTN+GRPO (zero-RL)": tiny_branch("W2G128", method="rtn", grpo=True),
            "RTN+KD+GRPO": tiny_branch("W2G128", method="rtn", kd=True, grpo=True),
        },
        reference="BF16",
    )


@recipe
def pretrain_bundled() -> RunConfig:
    branch = tiny_branch().model_copy(update={"base_model": None, "pretrain": PretrainConfig()})
    return RunConfig(
        name="pretrain_bundled",
        description="make the bundled tiny reasoning model anew and evaluate it",
        branches={"pretrained": branch},
    )


@recipe
def r1_qwen_1_5b_w3g128() -> RunConfig:
    return paper_ladder("r1_qwen_1_5b_w3g128", "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", "W3G128")


@recipe
def qwen3_0_6b_w3g128() -> RunConfig:
    return paper_ladder("qwen3_0_6b_w3g128", "Qwen/Qwen3-0.6B", "W3G128")


@recipe
def qwen3_0_6b_w2g128() -> RunConfig:
    return paper_ladder("qwen3_0_6b_w2g128", "Qwen/Qwen3-0.6B", "W2G128")


@recipe
def qwen3_4b_w3g128() -> RunConfig:
    return paper_ladder("qwen3_4b_w3g128", "Qwen/Qwen3-4B", "W3G128")


@recipe
def r1_qwen_1_5b_w4a4kv4() -> RunConfig:
    model = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
    return paper_w4a4kv4("r1_qwen_1_5b_w4a4kv4", model, calibration_length=4096)


@recipe
def qwen3_0_6b_w4a4kv4() -> RunConfig:
    return paper_w4a4kv4("qwen3_0_6b_w4a4kv4", "Qwen/Qwen3-0.6B")


@recipe
def qwen3_4b_w4a4kv4() -> RunConfig:
    return paper_w4a4kv4("qwen3_4b_w4a4kv4", "Qwen/Qwen3-4B")


def configured(name: str, overrides: Sequence[str], branches: Sequence[str], checkpoint: str | None) -> RunConfig:
    """The run that a recipe and the choices of a command line or deployment describe.

    With `checkpoint`, one branch that evaluates it as the recipe's first branch would be evaluated.
    Raises ConfigError for an unknown recipe, key, value or branch, and StoreError for an unknown digest.
    """
    if name not in RECIPES:
        raise ConfigError(f"unknown recipe {name!r}; {nearest(name, list(RECIPES))}")
    run = apply_overrides(RECIPES[name]().select(branches), overrides)
    if checkpoint is None:
        return run
    ref = Store().resolve(checkpoint)
    if ref.kind != "checkpoint":
        raise ConfigError(
            f"{ref.kind}:{ref.short} is no checkpoint: give the digest of one, as `reasoning-qat ls` shows"
        )
    first = next(iter(run.branches.values()))
    evaluation = first.model_dump(include={"test_data", "evaluate", "benchmarks", "benchmark_data"})
    branch = BranchConfig(checkpoint=ref.digest, **evaluation)
    return run.with_branches({f"checkpoint {ref.short}": branch})
