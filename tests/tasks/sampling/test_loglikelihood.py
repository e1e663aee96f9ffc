"""Log-likelihoods of given continuations against one plain forward pass per pair, in float64."""

import pytest
import torch

from quant.grids.scheme import Scheme
from quant.student.linear import prepare
from quant.student.sites import quantizers_disabled
from tasks.checkpoints.models import load_model
from tasks.sampling import loglikelihood as scoring
from tasks.sampling.engine import TokenPair
from tasks.sampling.transformers_engine import TransformersEngine
from tests.quant.plain import convert
from tests.tasks.sampling.test_transformers_engine import LIMIT, VOCABULARY, make_model

PAIRS: list[TokenPair] = [
    ((2,), (3,)),
    ((2, 9, 4), (5, 6, 7, 8, 9, 10, 11)),
    ((7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7), (12,)),
    ((7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7), (13, 14)),
    (tuple(range(2, 22)), tuple(range(10, LIMIT - 10))),
]


@torch.no_grad()
def score_plainly(model, pair: TokenPair) -> tuple[float, bool]:
    context, continuation = pair
    logits_TV = model(torch.tensor([context + continuation]), use_cache=False).logits[0].double()
    logprob_TV = logits_TV.log_softmax(-1)[len(context) - 1 : -1]
    total = sum(float(logprob_V[token]) for logprob_V, token in zip(logprob_TV, continuation, strict=True))
    return total, logprob_TV.argmax(-1).tolist() == list(continuation)


def greedy_continuation(model, context: tuple[int, ...], length: int) -> tuple[int, ...]:
    tokens = list(context)
    for _ in range(length):
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    return tuple(tokens[len(context) :])


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
@pytest.mark.parametrize("pass_tokens", [1, 64, 4096])
def test_batched_and_padded_as_one_by_one(family, pass_tokens, monkeypatch):
    monkeypatch.setattr(scoring, "PASS_TOKENS", pass_tokens)
    model = make_model(family).eval()
    pairs = [*PAIRS, ((5, 6), greedy_continuation(model, (5, 6), 4))]
    found = TransformersEngine(model, 0).loglikelihood(pairs)
    expected = [score_plainly(model.double(), pair) for pair in pairs]
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert found[-1][1] and not found[1][1]
    assert [total for total, _ in found] == pytest.approx([total for total, _ in expected], abs=1e-4)


def test_one_wrong_token_in_the_middle_is_not_greedy():
    model = make_model().eval()
    greedy = greedy_continuation(model, (5, 6), 4)
    wrong = (*greedy[:2], (greedy[2] + 1) % VOCABULARY, greedy[3])
    assert [is_greedy for _, is_greedy in TransformersEngine(model, 0).loglikelihood([((5, 6), wrong)])] == [False]


def test_probabilities_of_all_continuations_add_up_to_one():
    pairs = [((5, 6), (first, second)) for first in range(VOCABULARY) for second in range(VOCABULARY)]
    scores = TransformersEngine(make_model(), 0).loglikelihood(pairs)
    assert torch.tensor([total for total, _ in scores], dtype=torch.float64).exp().sum().item() == pytest.approx(1)
    assert sum(greedy for _, greedy in scores) == 1


def test_a_student_is_scored_dequantized_and_left_in_training():
    student = prepare(make_model(), Scheme(bits=3, group_size=8), None, "recomputed").train()
    found = TransformersEngine(student, 0).loglikelihood(PAIRS)
    assert student.training
    expected = [score_plainly(convert(student).eval(), pair) for pair in PAIRS]
    assert [total for total, _ in found] == pytest.approx([total for total, _ in expected], abs=1e-4)


def test_quantized_activations_and_caches_are_part_of_the_score(make_student, save_checkpoint):
    """A checkpoint of random weights; 4-bit rounding is per token, so padding and batching change nothing."""
    model = load_model(save_checkpoint(make_student("qwen3", learned=True)), torch.float32, "cpu")
    engine = TransformersEngine(model, 0)
    together, apart = engine.loglikelihood(PAIRS), [engine.loglikelihood([pair])[0] for pair in PAIRS]
    assert together[0][0] == pytest.approx(apart[0][0], abs=1e-3)
    assert apart[0][0] == pytest.approx(score_plainly(model, PAIRS[0])[0], abs=1e-3)
    with quantizers_disabled(model):
        assert abs(score_plainly(model, PAIRS[0])[0] - apart[0][0]) > 1e-2


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (((), (3,)), "pair 1: context and continuation need at least one token"),
        (((3,), ()), "pair 1: context and continuation need at least one token"),
        (((3,) * LIMIT, (3,)), f"pair 1 has {LIMIT + 1} tokens and the limit is {LIMIT}: leave it out"),
    ],
)
def test_unusable_pairs_are_refused_before_any_computation(pair, message):
    engine = TransformersEngine(make_model(), 0)
    engine.model.get_decoder().register_forward_pre_hook(lambda *arguments: pytest.fail("it computed"))
    with pytest.raises(ValueError, match=message):
        engine.loglikelihood([PAIRS[0], pair])


def test_no_pairs_no_scores():
    assert TransformersEngine(make_model(), 0).loglikelihood([]) == []
