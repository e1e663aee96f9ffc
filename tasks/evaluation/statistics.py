"""How sure one can be of an accuracy, and of the difference between two checkpoints.

The unit of resampling is the problem: a problem's value is its mean over the seeds, so that seeds, which repeat the
same problems, never count as more problems.  Everything here is deterministic: the resampling seed is fixed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

NUM_RESAMPLES = 10_000
RESAMPLING_SEED = 20_240_607  # any fixed number: the same samples always get the same interval
Z_95 = 1.959963984540054
CI_METHOD = "bootstrap over problems (percentile, 10000 resamples); Wilson where all problems have the same value"

Interval = tuple[float, float]


def wilson_interval(proportion: float, num: int) -> Interval:
    """Wilson's 95% score interval of `proportion` seen in `num` independent trials (Wilson 1927, JASA 22:209-212)."""
    if num < 1:
        raise ValueError("an interval needs at least one problem")
    spread = Z_95 * math.sqrt(proportion * (1 - proportion) / num + Z_95**2 / (4 * num**2))
    centre = proportion + Z_95**2 / (2 * num)
    scale = 1 + Z_95**2 / num
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def resampled_means(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Means of NUM_RESAMPLES resamples with replacement of values [num_problems].

    Means over a few seeds take few distinct values, so how often each is drawn is one multinomial draw.
    """
    levels, counts = np.unique(values, return_counts=True)
    drawn = rng.multinomial(len(values), counts / len(values), size=NUM_RESAMPLES)
    return drawn @ levels / len(values)


def bootstrap_interval(values: np.ndarray) -> Interval:
    """95% percentile bootstrap interval of the mean of values [num_problems]."""
    means = resampled_means(values, np.random.default_rng(RESAMPLING_SEED))
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def accuracy_interval(problem_means: np.ndarray) -> Interval:
    """95% interval of an accuracy from its per-problem means [num_problems], each in [0, 1].

    A bootstrap of equal values has no width, which would claim certainty for 0 right of 10: those get Wilson's.
    """
    if problem_means.min() == problem_means.max():
        return wilson_interval(float(problem_means[0]), len(problem_means))
    return bootstrap_interval(problem_means)


def problem_means(samples: pd.DataFrame) -> pd.Series:
    """Mean correctness over the seeds for each problem_id, sorted by problem_id."""
    return samples["correct"].astype(float).groupby(samples["problem_id"]).mean().sort_index()


def summarize(samples: pd.DataFrame, seeds: Sequence[int]) -> dict[str, Any]:
    """The figures of one evaluation from its samples (columns as in samples.parquet).

    `std` is the sample standard deviation (ddof=1) of the accuracy over the seeds; None with one seed, where it is
    undefined.
    """
    per_seed = [float(samples.loc[samples["seed"] == seed, "correct"].mean()) for seed in seeds]
    means = problem_means(samples)
    tiered = samples[samples["tier"] != ""]
    return {
        "num_problems": len(means),
        "seeds": list(seeds),
        "accuracy": float(means.mean()),
        "std": float(np.std(per_seed, ddof=1)) if len(seeds) > 1 else None,
        "ci95": list(accuracy_interval(means.to_numpy())),
        "ci_method": CI_METHOD,
        "per_seed": per_seed,
        "tiers": {str(tier): _tier(rows) for tier, rows in tiered.groupby("tier", sort=True)},
        "truncation_rate": float((samples["finish_reason"] == "length").mean()),
        "mean_length": float(samples["num_output_tokens"].mean()),
    }


def _tier(rows: pd.DataFrame) -> dict[str, Any]:
    means = problem_means(rows)
    ci95 = list(accuracy_interval(means.to_numpy()))
    return {"accuracy": float(means.mean()), "ci95": ci95, "num": len(means)}


def paired_bootstrap(samples_a: pd.DataFrame, samples_b: pd.DataFrame) -> dict[str, Any]:
    """Accuracy of b minus accuracy of a on the same problems: {diff, ci95, p_value, num_problems}.

    ci95 is a percentile bootstrap over problems of the paired differences; p_value is two-sided, from randomly flipping
    the signs of the same differences (under "no difference" a and b are exchangeable problem by problem), which unlike
    a bootstrap p-value stays honest with few problems.

    Raises:
        ValueError: the two evaluations are not over the same problems.
    """
    means_a, means_b = problem_means(samples_a), problem_means(samples_b)
    unpaired = means_a.index.symmetric_difference(means_b.index)
    if len(unpaired):
        raise ValueError(
            f"{len(unpaired)} problems are in only one of the two evaluations (first: {unpaired[0]}): "
            "compare evaluations of the same data with the same num_problems"
        )
    differences = (means_b - means_a).to_numpy()
    return {
        "diff": float(differences.mean()),
        "ci95": list(_difference_interval(differences)),
        "p_value": sign_flip_p_value(differences),
        "num_problems": len(differences),
    }


def _difference_interval(differences: np.ndarray) -> tuple[float, float]:
    """Bootstrap interval; where all differences are the same, Wilson's width for 0 of n instead of false certainty."""
    if differences.min() < differences.max():
        low, high = bootstrap_interval(differences)
        return low, high
    same, width = float(differences[0]), wilson_interval(0, len(differences))[1]
    return max(-1.0, same - width), min(1.0, same + width)


def sign_flip_p_value(differences: np.ndarray) -> float:
    """Two-sided p-value of mean(differences) when each difference [num_problems] is as likely with the other sign."""
    rng = np.random.default_rng(RESAMPLING_SEED)
    levels, counts = np.unique(np.abs(differences), return_counts=True)
    positive = rng.binomial(counts, 0.5, size=(NUM_RESAMPLES, len(counts)))
    sums = (2 * positive - counts) @ levels
    rounding = 1e-9  # sums of the same terms in another order must compare equal
    as_extreme = int((np.abs(sums) >= abs(differences.sum()) - rounding).sum())
    return (1 + as_extreme) / (1 + NUM_RESAMPLES)
