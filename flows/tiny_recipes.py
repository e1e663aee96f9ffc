"""Branches on the bundled tiny reasoning model.

The training settings were not tuned: learning rates are guesses from a feasibility experiment, and the numbers of
steps fit the demo into ten minutes on two cores. Each training gives its best state by a held-out measure, its start
included: one that does harm ends where it began.
"""

from __future__ import annotations

from typing import Any

from flows.branches import BranchConfig
from quant.grids.scheme import Scheme
from quant.methods.options import FlatQuantOptions, GPTQOptions
from tasks.base_model import BaseModelConfig
from tasks.calibrate import CalibrateConfig
from tasks.dataset import DatasetConfig
from tasks.evaluate import EvaluateConfig
from tasks.grpo_train import GRPOTrainConfig
from tasks.kd_train import KDTrainConfig
from tasks.ptq_init import PTQInitConfig
from tasks.sampling.config import CalibrationGeneration, GenerationConfig, RolloutGeneration
from tasks.sft_train import SFTTrainConfig

MAX_NEW_TOKENS = 192
VALIDATION = DatasetConfig(source="bundled", split="validation", num_examples=128, seed=31)
TEST = DatasetConfig(source="bundled", split="test", num_examples=500, seed=999)
EVALUATE = EvaluateConfig(
    name="bundled", seeds=(42, 43, 44), generation=GenerationConfig(max_new_tokens=MAX_NEW_TOKENS, batch_size=384)
)

METHODS_WEIGHT_ONLY = {"RTN": "rtn", "AWQ": "awq", "GPTQ": "gptq"}
METHODS_WITH_ACTIVATIONS = {"RTN": "rtn", "GPTQ": "gptq", "QuaRot": "quarot", "FlatQuant": "flatquant"}

FLATQUANT = FlatQuantOptions(epochs=5)

# Table 6 has transforms learn 50 times and clips 500 times as fast as weights, which at these rates would be too fast.
LEARNED_RATES = {"transform_learning_rate": 2e-4, "clip_learning_rate": 2e-3}
# One set of values for SFT and KD, so that they differ in the objective alone.
QAT: dict[str, Any] = {
    "steps": 60,
    "learning_rate": 2e-4,
    "warmup_steps": 10,
    "batch_size": 32,
    "micro_batch_size": 32,
    "checkpoint_every": 20,
    "keep": "best",
    "validate_every": 10,
    "max_length": 512,
    "mixed_precision": "bf16",
    "attention": "eager",
    **LEARNED_RATES,
}
GRPO: dict[str, Any] = {
    "steps": 12,
    "learning_rate": 5e-5,
    "warmup_steps": 2,
    "batch_size": 64,
    "micro_batch_size": 64,
    "checkpoint_every": 3,
    "keep": "best",
    "validate_every": 4,
    "generation": RolloutGeneration(max_new_tokens=MAX_NEW_TOKENS),
    "mixed_precision": "bf16",
    "attention": "eager",
    **LEARNED_RATES,
}


def tiny_branch(
    scheme: str | None = None,
    *,
    method: str = "gptq",
    calibration: str = "bundled",
    sft: bool = False,
    kd: bool = False,
    kd_data: str = "bundled",
    grpo: bool = False,
) -> BranchConfig:
    """One branch: the bundled model as it is, or quantized to `scheme` and trained as told.

    RTN starts are symmetric with a recomputed grid, others asymmetric with a frozen one (paper, section 3.1); where
    activations are quantized too, all are symmetric. FlatQuant's grid follows from what it learns, a step per batch.
    """
    if scheme is None:
        return BranchConfig(base_model=BaseModelConfig(), test_data=TEST, evaluate=EVALUATE)
    calibrated, flatquant = method != "rtn", method == "flatquant"
    scale_mode = "frozen" if calibrated and not flatquant else "recomputed"
    ptq = {"flatquant": FLATQUANT, "batch_size": 16} if flatquant else {"batch_size": 64}
    symmetric = not calibrated or not Scheme.parse(scheme).weight_only
    return BranchConfig(
        base_model=BaseModelConfig(),
        calibration_data=DatasetConfig(source=calibration, split="calibration", num_examples=256, seed=5),
        calibrate=_calibrate(calibration) if calibrated else None,
        ptq_init=PTQInitConfig(scheme=scheme, method=method, symmetric=symmetric, **ptq),
        train_data=DatasetConfig(source=kd_data, split="train", num_examples=4096, seed=4242),
        validation_data=VALIDATION.model_copy(update={"source": kd_data}),
        sft_train=SFTTrainConfig(scale_mode=scale_mode, **QAT) if sft else None,
        kd_train=KDTrainConfig(scale_mode=scale_mode, **QAT) if kd else None,
        rl_data=DatasetConfig(source="bundled", split="train", num_examples=1024, seed=77),
        grpo_train=GRPOTrainConfig(scale_mode=scale_mode, **GRPO) if grpo else None,
        test_data=TEST,
        evaluate=EVALUATE,
    )


def _calibrate(source: str) -> CalibrateConfig:
    """The model answers the problems itself; plain text has nothing to answer and is taken as given."""
    responses = "generated" if source == "bundled" else "given"
    return CalibrateConfig(
        responses=responses, packing="examples", num_sequences=256, sequence_length=256,
        generation=CalibrationGeneration(max_new_tokens=MAX_NEW_TOKENS),
    )  # fmt: skip


def tiny_ladder(scheme: str) -> dict[str, BranchConfig]:
    """The rungs of the paper's Table 5 that the demo climbs, at one scheme."""
    return {
        f"{scheme} RTN": tiny_branch(scheme, method="rtn"),
        f"{scheme} GPTQ": tiny_branch(scheme),
        f"{scheme} GPTQ+SFT": tiny_branch(scheme, sft=True),
        f"{scheme} GPTQ+KD": tiny_branch(scheme, kd=True),
        f"{scheme} GPTQ+KD+GRPO": tiny_branch(scheme, kd=True, grpo=True),
    }


def tiny_methods(scheme: str) -> dict[str, BranchConfig]:
    """Each PTQ method of the paper's Table 4 that is for such a scheme."""
    methods = METHODS_WEIGHT_ONLY if Scheme.parse(scheme).weight_only else METHODS_WITH_ACTIVATIONS
    return {f"{scheme} {label}": tiny_branch(scheme, method=method) for label, method in methods.items()}


def two_bit_choices() -> dict[str, BranchConfig]:
    """What is open at 2 bits, one choice at a time: grid, clip and group of the GPTQ start, and the scales in KD.

    Compared on problems that are not the test problems, on which results are reported.
    """
    starts: dict[str, dict[str, Any]] = {
        "asymmetric, MSE clip": {},
        "asymmetric, min-max": {"gptq": GPTQOptions(mse_clip=False)},
        "symmetric, MSE clip": {"symmetric": True},
        "asymmetric, MSE clip, group 64": {"scheme": "W2G64"},
    }
    branches = {f"GPTQ {label}": _changed(tiny_branch("W2G128"), ptq_init=update) for label, update in starts.items()}
    with_kd = {
        f"GPTQ {label} + KD, frozen scales": _changed(tiny_branch("W2G128", kd=True), ptq_init=update)
        for label, update in starts.items()
    }
    with_kd |= {
        f"GPTQ asymmetric, MSE clip + KD, {mode} scales": _changed(
            tiny_branch("W2G128", kd=True), kd_train={"scale_mode": mode}
        )
        for mode in ("learned", "recomputed")
    }
    others = {"split": "calibration", "seed": 4321}
    return {label: _changed(branch, test_data=others) for label, branch in (branches | with_kd).items()}


def _changed(branch: BranchConfig, **updates: dict[str, Any]) -> BranchConfig:
    sections = {name: getattr(branch, name).model_copy(update=update) for name, update in updates.items()}
    return branch.model_copy(update=sections)


def ladder_comparisons(scheme: str) -> tuple[tuple[str, str], ...]:
    """What the paper leads one to expect: each pair's first above its second."""
    rungs = (("GPTQ", "RTN"), ("GPTQ+KD", "GPTQ"), ("GPTQ+KD", "GPTQ+SFT"), ("GPTQ+KD+GRPO", "GPTQ+KD"))
    return tuple((f"{scheme} {better}", f"{scheme} {worse}") for better, worse in rungs)
