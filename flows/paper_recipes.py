"""The paper's own configurations: Table 5's ladder with the hyperparameters of Tables 6 and 7.

The stage configurations' defaults are the tables' GPTQ columns, so only what differs is written here.

Interpretation: the paper does not say how long its OpenR1-Math sequences are; 8192 tokens, the length of its WikiText
sequences, is used, and longer traces are left out and counted.
"""

from __future__ import annotations

from typing import Any

from flows.config import BranchConfig, RunConfig
from tasks.base_model import BaseModelConfig
from tasks.calibrate import CalibrateConfig
from tasks.dataset import DatasetConfig
from tasks.evaluate import MATH_SUFFIX, EvaluateConfig
from tasks.grpo_train import GRPOTrainConfig
from tasks.kd_train import KDTrainConfig
from tasks.ptq_init import PTQInitConfig
from tasks.sft_train import SFTTrainConfig

RTN_LEARNING_RATE = 2e-5
"""Table 6, RTN initialisation; GPTQ initialisation has 1e-6."""
NUMINA_PROBLEMS = 256
"""Problems answered for calibration (ruikangliu/Quantized-Reasoning-Models, methods/utils/data_utils.py)."""

NUMINAMATH = DatasetConfig(source="AI-MO/NuminaMath-1.5", split="train", num_examples=NUMINA_PROBLEMS, seed=42)
OPENR1_MATH = DatasetConfig(source="open-r1/OpenR1-Math-220k", subset="default", split="train")
MATH_500 = DatasetConfig(source="HuggingFaceH4/MATH-500", split="test", prompt_field="problem", answer_field="answer")


def paper_branch(
    model: str, scheme: str | None = None, *, method: str = "gptq", sft: bool = False, kd: bool = False,
    grpo: bool = False,
) -> BranchConfig:  # fmt: skip
    """One row of Table 5."""
    common: dict[str, Any] = {
        "base_model": BaseModelConfig(model=model),
        "test_data": MATH_500,
        "evaluate": EvaluateConfig(name="math_500", engine="vllm", prompt_suffix=MATH_SUFFIX),
    }
    if scheme is None:
        return BranchConfig(**common)
    gptq = method == "gptq"
    start: dict[str, Any] = {
        "scale_mode": "frozen" if gptq else "recomputed",
        "mixed_precision": "bf16",
        "prompt_suffix": MATH_SUFFIX,
    }
    qat = start if gptq else {**start, "learning_rate": RTN_LEARNING_RATE}
    return BranchConfig(
        **common,
        calibration_data=NUMINAMATH,
        calibrate=CalibrateConfig(engine="vllm", prompt_suffix=MATH_SUFFIX) if gptq else None,
        ptq_init=PTQInitConfig(scheme=scheme, method=method, symmetric=not gptq, mse_clip=gptq),
        train_data=OPENR1_MATH,
        sft_train=SFTTrainConfig(**qat) if sft else None,
        kd_train=KDTrainConfig(**qat) if kd else None,
        rl_data=OPENR1_MATH,
        grpo_train=GRPOTrainConfig(engine="vllm", importance_sampling=True, **start) if grpo else None,
    )


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
