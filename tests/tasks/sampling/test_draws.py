"""Sampling against scalar references."""

import math

import pytest
import torch

from tasks.runtime.stage import StageError
from tasks.sampling.draws import invert_cdf, nucleus, sample_tokens, uniform_streams


def scalar_nucleus(probabilities: list[float], top_p: float) -> dict[int, float]:
    """Token -> mass of the smallest most-probable set that reaches top_p."""
    kept: dict[int, float] = {}
    for token in sorted(range(len(probabilities)), key=lambda v: -probabilities[v]):
        if sum(kept.values()) >= top_p:
            break
        kept[token] = probabilities[token]
    return kept


def test_streams_depend_on_all_bits_of_the_seed_and_on_nothing_else() -> None:
    alone = uniform_streams([7], 5)
    among = uniform_streams([3, 7, 2**32 + 7, 2**62], 9)
    assert torch.equal(among[1, :5], alone[0])
    assert not torch.equal(among[2], among[1])
    assert among.min() >= 0 and among.max() < 1


@pytest.mark.parametrize("uniform", [0.0, 0.3, 0.31, 0.999, 1 - 2**-24])
def test_invert_cdf_never_picks_mass_zero(uniform: float) -> None:
    mass = torch.tensor([[0.0, 0.3, 0.0, 0.4, 0.3, 0.0]])
    index = invert_cdf(mass, torch.tensor([uniform])).item()
    expected = 1 if uniform < 0.3 else 3 if uniform < 0.7 else 4
    assert index == (expected if uniform != 0.3 else index)
    assert mass[0, int(index)] > 0


@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.9, 0.999])
def test_nucleus_equals_scalar_reference_beyond_the_candidates(top_p: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 300, generator=generator) * torch.tensor([[0.01], [1.0], [3.0], [8.0]])
    probabilities = logits.double().softmax(-1)
    mass, token = nucleus(probabilities, top_p)
    for row in range(4):
        kept = {int(t): float(m) for t, m in zip(token[row], mass[row], strict=True) if m > 0}
        assert kept == pytest.approx(scalar_nucleus(probabilities[row].tolist(), top_p))


def test_draws_follow_the_tempered_nucleus() -> None:
    logits = torch.tensor([0.5, 2.0, -1.0, 1.5, 0.0])
    temperature, top_p, num_draws = 0.7, 0.8, 40_000
    weights = [math.exp(x / temperature) for x in logits.tolist()]
    probabilities = [w / sum(weights) for w in weights]
    kept = scalar_nucleus(probabilities, top_p)
    uniform = uniform_streams([11], num_draws)[0]
    tokens, logprobs = sample_tokens(logits.expand(num_draws, 5), uniform, temperature, top_p)
    for token in range(5):
        share = (tokens == token).float().mean().item()
        assert share == pytest.approx(kept.get(token, 0.0) / sum(kept.values()), abs=0.01)
    expected = torch.tensor(probabilities).log()[tokens]
    torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 3, 6])
@pytest.mark.parametrize(("temperature", "top_p"), [(0.0, 1.0), (1.0, 1.0), (0.7, 0.8)])
def test_logits_that_are_not_finite_are_told(bad, place, temperature, top_p) -> None:
    logits = torch.zeros(3, 7)
    logits[1, place] = bad
    with pytest.raises(StageError, match=r"the model's logits are not finite.*check the checkpoint"):
        sample_tokens(logits, torch.full((3,), 0.5), temperature, top_p)
    logits[1] = -math.inf
    with pytest.raises(StageError, match="not finite"):
        sample_tokens(logits, torch.full((3,), 0.5), temperature, top_p)
    logits[1, place] = 0.0  # a token that is ruled out is no fault
    tokens, _ = sample_tokens(logits, torch.full((3,), 0.5), temperature, top_p)
    assert int(tokens[1]) == place


def test_greedy_reports_the_untempered_logprob() -> None:
    logits = torch.tensor([[0.0, 1.0, 3.0], [5.0, 1.0, 3.0]])
    tokens, logprobs = sample_tokens(logits, torch.zeros(2), 0.0, 1.0)
    assert tokens.tolist() == [2, 0]
    for row in range(2):
        values = [math.exp(x) for x in logits[row].tolist()]
        assert logprobs[row].item() == pytest.approx(math.log(max(values) / sum(values)), abs=1e-6)
