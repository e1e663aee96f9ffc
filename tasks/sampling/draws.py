"""Drawing tokens by inverse CDF, each row from its own random stream.

Dimensions: B rows, V vocabulary, K most probable tokens, N draws.
"""

from collections.abc import Sequence

import numpy as np
import torch

from tasks.runtime.stage import StageError

# Tokens looked at for the top-p cut, before all are: sorting 150,000 probabilities costs more than the model.
NUCLEUS_CANDIDATES = (64, 2048)


def check_finite(logprobs: torch.Tensor) -> None:
    """StageError if logits were not finite: one NaN or infinity makes all log-probabilities of its row NaN."""
    if bool(logprobs.isnan().any()):
        raise StageError(
            "the model's logits are not finite: its weights hold NaN or infinity, or its numbers overflow in this "
            "dtype; check the checkpoint, or set generation.dtype=float32"
        )


def uniform_streams(seeds: Sequence[int], num_draws: int) -> torch.Tensor:
    """Uniform numbers in [0, 1) of shape [B, N], float32; row b depends on seeds[b] alone.

    numpy seeds from all bits of the integer; torch's CPU generator would use the low 32 only.
    """
    draws_BN = np.empty((len(seeds), num_draws), dtype=np.float32)
    for row, seed in zip(draws_BN, seeds, strict=True):
        np.random.Generator(np.random.PCG64(seed)).random(dtype=np.float32, out=row)
    return torch.from_numpy(draws_BN)


def invert_cdf(mass_BV: torch.Tensor, uniform_B: torch.Tensor) -> torch.Tensor:
    """Index [B] drawn in proportion to the non-negative `mass_BV`, never one of mass 0."""
    cdf_BV = mass_BV.cumsum(-1)
    total_B = cdf_BV[:, -1]
    # u * total may round up to the total, where no index lies.
    target_B = torch.minimum(uniform_B * total_B, torch.nextafter(total_B, torch.zeros_like(total_B)))
    return torch.searchsorted(cdf_BV, target_B[:, None], right=True).squeeze(1)


def nucleus(probability_BV: torch.Tensor, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The smallest set of most probable tokens whose mass reaches `top_p`, as (mass_BK, token_BK).

    Tokens outside the set have mass 0. Exact: more candidates are taken until they hold the mass in every row
    (nucleus sampling, Holtzman et al. 2020, arXiv:1904.09751).
    """
    vocabulary = probability_BV.shape[-1]
    for num_candidates in (*NUCLEUS_CANDIDATES, vocabulary):
        mass_BK, token_BK = probability_BV.topk(min(num_candidates, vocabulary))
        if num_candidates >= vocabulary or bool((mass_BK.sum(-1) >= top_p).all()):
            break
    before_BK = mass_BK.cumsum(-1) - mass_BK
    return mass_BK * (before_BK < top_p), token_BK


def sample_tokens(
    logits_BV: torch.Tensor, uniform_B: torch.Tensor, temperature: float, top_p: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [B] int64 and their float32 log-probabilities [B] under softmax(logits / temperature).

    Temperature 0 takes the most probable token and reports its log-probability under softmax(logits).
    Raises StageError for logits that hold NaN or infinity.
    """
    logits_BV = logits_BV.float()
    logprob_BV = (logits_BV / (temperature or 1.0)).log_softmax(-1)
    check_finite(logprob_BV[:, 0])
    if temperature == 0:
        token_B = logits_BV.argmax(-1)
    else:
        mass_BV = logprob_BV.exp()
        if top_p < 1:
            mass_BK, candidate_BK = nucleus(mass_BV, top_p)
            choice_B = invert_cdf(mass_BK, uniform_B)
            token_B = candidate_BK.gather(1, choice_B[:, None]).squeeze(1)
        else:
            token_B = invert_cdf(mass_BV, uniform_B)
    return token_B, logprob_BV.gather(1, token_B[:, None]).squeeze(1)
