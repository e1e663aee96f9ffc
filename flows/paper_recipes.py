"""The paper's own configurations: Table 5's ladder with the hyperparameters of Tables 6 and 7.

The stage configurations' defaults are the tables' GPTQ columns, so only what differs is written here.

Interpretation: the paper does not say how long its OpenR1-Math sequences are; 8192 tokens, the length of its WikiText
sequences, is used, and longer traces are left out and counted.

The last state of each training is given, as the paper does; with validation_data its held-out curve is logged too.

Departure: W4A4KV4 trains on WikiText-2 articles, cut off at 8192 tokens; the paper draws 48k sequences of 8192 tokens
from it, which must overlap: they are over a hundred times the corpus.
"""

from __future__ import annotations

from typing import Any

from flows.branches import BranchConfig
from flows.config import RunConfig
from tasks.base_model import BaseModelConfig
from tasks.calibrate import CalibrateConfig
from tasks.data.benchmarks import MATH_SUFFIX, BenchmarkName
from tasks.dataset import DatasetConfig
from tasks.evaluate import EvaluateConfig
from tasks.grpo_train import GRPOTrainConfig
from tasks.kd_train import KDTrainConfig
from tasks.ptq_init import PTQInitConfig
from tasks.sampling.config import CalibrationGeneration, GenerationConfig, RolloutGeneration
from tasks.sft_train import SFTTrainConfig

RTN_LEARNING_RATE = 2e-5
"""Table 6, RTN initialisation; GPTQ initialisation has 1e-6."""
NUMINA_PROBLEMS = 256
"""Problems answered for calibration (ruikangliu/Quantized-Reasoning-Models, methods/utils/data_utils.py)."""

CALIBRATION = CalibrationGeneration(engine="vllm", prompt_suffix=MATH_SUFFIX)
ROLLOUTS = RolloutGeneration(engine="vllm", prompt_suffix=MATH_SUFFIX)
NUMINAMATH = DatasetConfig(source="AI-MO/NuminaMath-1.5", split="train", num_examples=NUMINA_PROBLEMS, seed=42)
WIKITEXT = DatasetConfig(source="Salesforce/wikitext", subset="wikitext-2-raw-v1", split="train")
OPENR1_MATH = DatasetConfig(source="open-r1/OpenR1-Math-220k", subset="default", split="train")
NUMINAMATH = DatasetConfig(
    source="AI-MO/NuminaMath-1.5",
    revision="1b05109f9e5c1ad06c0663519502416c30b300f8",
    split="train",
    num_examples=NUMINA_PROBLEMS,
    seed=42,
)
WIKITEXT = DatasetConfig(
    source="Salesforce/wikitext",
    revision="b08601e04326c79dfdd32d625aee71d232d685c3",
    subset="wikitext-2-raw-v1",
    split="train",
)
OPENR1_MATH = DatasetConfig(
    source="open-r1/OpenR1-Math-220k",
    revision="e4e141ec9dea9f8326f4d347be56105859b2bd68",
    subset="default",
    split="train",
)
PAPER_BENCHMARKS: tuple[BenchmarkName, ...] = (
    "aime_120", "math_500", "gsm8k", "gpqa_diamond", "livecodebench_v4_v5",
)  # fmt: skip
"""Table 4's."""


def paper_branch(
    model: str, scheme: str | None = None, *, method: str = "gptq", sft: bool = False, kd: bool = False,
    grpo: bool = False,
) -> BranchConfig:  # fmt: skip
    """One row of Table 5."""
    if scheme is None:
        return BranchConfig(**_common(model))
    gptq = method == "gptq"
    start: dict[str, Any] = {
        "scale_mode": "frozen" if gptq else "recomputed",
        "mixed_precision": "bf16",
        "keep": "last",
    }
    qat = {**start, "prompt_suffix": MATH_SUFFIX} | ({} if gptq else {"learning_rate": RTN_LEARNING_RATE})
    return BranchConfig(
        **_common(model),
        calibration_data=NUMINAMATH,
        calibrate=CalibrateConfig(generation=CALIBRATION) if gptq else None,
        ptq_init=PTQInitConfig(scheme=scheme, method=method, symmetric=not gptq),
        train_data=OPENR1_MATH,
        sft_train=SFTTrainConfig(**qat) if sft else None,
        kd_train=KDTrainConfig(**qat) if kd else None,
        rl_data=OPENR1_MATH,
        grpo_train=GRPOTrainConfig(generation=ROLLOUTS, importance_sampling=True, **start) if grpo else None,
    )


def _common(model: str) -> dict[str, Any]:
    return {
        "base_model": BaseModelConfig(model=model),
        "evaluate": EvaluateConfig(generation=GenerationConfig(engine="vllm")),
        "benchmarks": PAPER_BENCHMARKS,
    }


def paper_ladder(name: str, model: str, scheme: str) -> RunConfig:
    """Table 5: RTN and GPTQ starts, SFT and KD on each, GRPO on what KD gave; and the full-precision model."""
    branches = {"BF16": paper_branch(model)}
    for method in ("rtn", "gptq"):
        start = method.upper()
        branches |= {
            start: paper_branch(model, scheme, method=method),
            f"{start}+SFT": paper_branch(model, scheme, method=method, sft=True),
            f"{start}+KD": paper_branch(model, scheme, method=method, kd=True),
            f"{start}+KD+GRPO": paper_branch(model, scheme, method=method, kd=True, grpo=True),
        }
    return RunConfig(
        name=name,
        description=f"{model}, {scheme}: the ladder of Table 5 with the hyperparameters of Tables 6 and 7",
        branches=branches,
        reference="BF16",
    )


def paper_w4a4kv4(name: str, model: str, calibration_length: int = 2048) -> RunConfig:
    """Table 4's rows at W4A4KV4: FlatQuant, and KD and GRPO from it, with Table 6's W4A4 column.

    WikiText-2 for calibration and KD (Table 3); 128 sequences of `calibration_length` tokens, 4096 for R1-Qwen-1.5B
    (ruikangliu/Quantized-Reasoning-Models, scripts/quantization/flatquant.sh).
    """
    return RunConfig(
        name=name,
        description=f"{model}, W4A4KV4: FlatQuant -> KD -> GRPO with the hyperparameters of Tables 6 and 7",
        branches={
            "BF16": paper_branch(model),
            "FlatQuant": _flatquant_branch(model, calibration_length),
            "FlatQuant+KD": _flatquant_branch(model, calibration_length, kd=True),
            "Reasoning-QAT": _flatquant_branch(model, calibration_length, kd=True, grpo=True),
        },
        reference="BF16",
        comparisons=(("FlatQuant+KD", "FlatQuant"), ("Reasoning-QAT", "FlatQuant+KD"), ("Reasoning-QAT", "FlatQuant")),
    )


def _flatquant_branch(model: str, calibration_length: int, *, kd: bool = False, grpo: bool = False) -> BranchConfig:
    start: dict[str, Any] = {"scale_mode": "recomputed", "mixed_precision": "bf16", "keep": "last"}
    rl = GRPOTrainConfig(generation=ROLLOUTS, importance_sampling=True, **start)
    return BranchConfig(
        **_common(model),
        calibration_data=WIKITEXT,
        calibrate=CalibrateConfig(responses="given", sequence_length=calibration_length),
        ptq_init=PTQInitConfig(scheme="W4A4KV4", method="flatquant", symmetric=True),
        train_data=WIKITEXT,
        kd_train=KDTrainConfig(steps=3000, warmup_steps=90, overlong="truncate", **start) if kd else None,
        rl_data=OPENR1_MATH,
        grpo_train=rl if grpo else None,
    )
