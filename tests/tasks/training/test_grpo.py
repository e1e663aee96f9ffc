"""GRPO: advantages, weights and loss against plain loops; the metrics; the rollout source with a scripted engine."""

import math

import pytest
import torch

from tasks.judging.math_answer import Verdict
from tasks.runtime.stage import StageError
from tasks.sampling.engine import Completion, Request
from tasks.training.batches import Example, collate
from tasks.training.grpo import group_advantages, k3, token_weights, zero_variance
from tasks.training.grpo_config import PolicyConfig, RolloutConfig
from tasks.training.objectives import GRPOObjective, KDObjective
from tasks.training.rollouts import Prompt, RolloutBatches

BASE = dict(
    steps=8, learning_rate=1e-3, batch_size=4, group_size=2, micro_batch_size=4, generation={"max_new_tokens": 8}
)


def test_advantages_against_a_plain_loop():
    groups = [[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0], [0.1, 0.1, 0.1, 0.1]]
    for scale_by_std in (True, False):
        found = group_advantages(torch.tensor(groups, dtype=torch.float64), scale_by_std)
        for row, rewards in zip(found.tolist(), groups, strict=True):
            mean = sum(rewards) / 4
            std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / 3)
            expected = [(r - mean) / (std + 1e-4 if scale_by_std else 1) for r in rewards]
            assert row == pytest.approx(expected, abs=1e-12)
    assert found[1].abs().sum() == found[3].abs().sum() == 0.0
    assert zero_variance(torch.tensor(groups)).tolist() == [False, True, False, True]


def test_token_weights():
    """Total weight over denominator: per-sequence mean, token mean, constant length; a masked sequence weighs 0."""
    lengths, counted = [2, 4, 8], [True, True, False]
    assert token_weights(lengths, counted, "grpo", 16) == ([1 / 2, 1 / 4, 0.0], 3.0)
    assert token_weights(lengths, counted, "dapo", 16) == ([1.0, 1.0, 0.0], 6.0)
    assert token_weights(lengths, counted, "dr_grpo", 16) == ([1.0, 1.0, 0.0], 48.0)
    assert token_weights(lengths, [False] * 3, "dapo", 16) == ([0.0] * 3, 1.0)


def test_k3_estimates_kl():
    """The mean of k3 over samples of p is KL(p || q), and no term is negative."""
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.5, 0.2, 0.3])
    expected = float((p * (p / q).log()).sum())
    assert float((p * k3((q / p).log())).sum()) == pytest.approx(expected, rel=1e-5)
    assert (k3(torch.linspace(-3, 3, 50)) >= 0).all()


def policy_batch(generator: torch.Generator, update: int = 0) -> dict[str, torch.Tensor]:
    rows = [
        Example(i, torch.randint(96, (n,), generator=generator).int(), s) for i, (n, s) in enumerate([(9, 4), (7, 2)])
    ]
    batch = collate(rows)
    num = len(batch["targets"])
    return batch | {
        "advantages": torch.randn(num, generator=generator, dtype=torch.float64),
        "weights": torch.rand(num, generator=generator, dtype=torch.float64),
        "engine_logprobs": -4 + torch.randn(num, generator=generator, dtype=torch.float64),
        "slot": torch.tensor(0),
        "update": torch.tensor(update),
    }


def log_probabilities(model, batch, temperature: float) -> torch.Tensor:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.flatten(0, 1)
    log_p = torch.log_softmax(logits[batch["positions"]] / temperature, -1)
    return log_p[torch.arange(len(batch["targets"])), batch["targets"]]


@pytest.mark.parametrize("importance", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("update", [0, 1])
def test_loss_against_a_plain_loop(tiny_model, update, beta, importance):
    """Value and gradient in float64, on-policy and after an update, with KL and importance weights."""
    config = PolicyConfig(
        steps=1, learning_rate=1.0, generation={"temperature": 0.7}, clip_low=0.1, clip_high=0.15, beta=beta,
        updates_per_rollout=2, importance_sampling=importance, importance_cap=2.0,
    )  # fmt: skip
    model, reference = tiny_model(0).double(), tiny_model(1).double()
    objective = GRPOObjective(model, config, reference if beta else None)
    batch = policy_batch(torch.Generator().manual_seed(0))
    old = log_probabilities(model, batch, 0.7).detach()
    loss, metrics = objective(batch)
    if update:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
        loss, metrics = objective(batch | {"update": torch.tensor(1)})
    new = log_probabilities(model, batch, 0.7)
    with torch.no_grad():
        against = log_probabilities(reference, batch, 0.7)
    expected, clipped = torch.zeros((), dtype=torch.float64), 0
    for t in range(len(new)):
        ratio, advantage = (new[t] - old[t]).exp(), batch["advantages"][t]
        limited = min(max(float(ratio.detach()), 0.9), 1.15)
        inside = float(ratio.detach()) * advantage <= limited * advantage
        clipped += not inside
        term = ratio * advantage if inside else limited * advantage
        if importance:
            term = term * min(math.exp(old[t] - batch["engine_logprobs"][t]), 2.0)
        if beta:
            term = term - beta * ((against[t] - new[t]).exp() - (against[t] - new[t]) - 1)
        expected = expected - batch["weights"][t] * term
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-8)
    names = [name for name, _ in model.named_parameters()]
    for name, found, wanted in zip(
        names, torch.autograd.grad(loss, list(model.parameters())),
        torch.autograd.grad(expected, list(model.parameters())), strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9, msg=name)
    assert metrics["clip_fraction"].tolist() == [clipped, len(new)]
    assert (clipped > 0) == bool(update)  # else the clipped branch is not tested
    delta = old - batch["engine_logprobs"]
    assert float(metrics["mismatch_abs"][0]) == pytest.approx(float(delta.abs().sum()), rel=1e-8)
    assert float(metrics["mismatch_k3"][0]) == pytest.approx(float((delta.exp() - delta - 1).sum()), rel=1e-8)
    assert float(metrics["max_mismatch"]) == pytest.approx(float(delta.abs().max()), rel=1e-8)
    assert ("kl" in metrics) == bool(beta)


def test_an_engine_without_log_probabilities_has_no_mismatch(tiny_model):
    batch = policy_batch(torch.Generator().manual_seed(0))
    batch["engine_logprobs"][:] = math.nan
    loss, metrics = GRPOObjective(tiny_model(), PolicyConfig(steps=1, learning_rate=1.0))(batch)
    assert loss.isfinite() and metrics["mismatch_abs"].tolist() == [0.0, 0.0]


def test_teacher_and_reference_are_no_submodules(tiny_model):
    """Otherwise data parallelism would synchronise them and checkpoints would hold them."""
    student = {f"model.{name}" for name, _ in tiny_model().named_parameters()}
    config = PolicyConfig(steps=1, learning_rate=1.0)
    for objective in (KDObjective(tiny_model(), tiny_model(1)), GRPOObjective(tiny_model(), config, tiny_model(1))):
        assert {name for name, _ in objective.named_parameters()} == student


class Script:
    """Problem i's completions have i + 1 tokens; of a problem's completions the first is right if `i % 2`."""

    def __init__(self, logprob: float = -1.0) -> None:
        self.requests: list[list[Request]] = []
        self.logprob = logprob

    def generate(self, requests, names, step):
        self.requests.append(requests)
        lasts = [request.prompt_ids[-1] for request in requests]
        return [Completion((n,) * n, (self.logprob,) * n, "length" if n == 3 else "stop") for n in lasts]

    def judge(self, responses, truths):
        self.responses = responses
        right = [i % 2 == 0 and len(response.text) % 2 == 0 for i, response in enumerate(responses)]
        return [Verdict(correct, "x" if correct else None, timed_out=False) for correct in right]


PROMPTS = [Prompt(f"p{i}", (50, i + 1), str(i)) for i in range(4)]


def source_of(script: Script, **changes) -> RolloutBatches:
    config = RolloutConfig(**(BASE | changes))
    return RolloutBatches(PROMPTS, script.generate, script.judge, lambda ids: "x" * len(ids), config)


def test_rollout_batches_hold_what_the_engine_gave():
    """Prompts of a group share their tokens, seeds never repeat, advantages and weights sit on their tokens."""
    script = Script()
    source = source_of(script, batch_size=8, micro_batch_size=3)
    step = source.step_batches(0)
    requests = script.requests[0]
    assert [r.prompt_ids for r in requests[::2]] == [r.prompt_ids for r in requests[1::2]]
    assert len({request.seed for request in requests}) == 8
    tokens = [t for batch in step.micro_batches for t in zip(
        batch["targets"].tolist(), batch["advantages"].tolist(), batch["weights"].tolist(), strict=True)]  # fmt: skip
    for length in (1, 2, 3, 4):
        mine = [(a, w) for target, a, w in tokens if target == length]
        assert len(mine) == 2 * length and all(w == pytest.approx(1 / length) for _, w in mine)
        half = math.sqrt(0.5) / (math.sqrt(0.5) + 1e-4) * math.sqrt(0.5)
        assert sorted({round(a, 4) for a, _ in mine}) == ([-round(half, 4), round(half, 4)] if length % 2 == 0 else [0])
    assert step.denominator == 8
    metrics = step.metrics
    assert (
        metrics["reward_mean"] == 0.25 and metrics["zero_variance_fraction"] == metrics["zero_reward_fraction"] == 0.5
    )
    assert metrics["response_length"] == 2.5 and metrics["truncated_fraction"] == metrics["answer_found_rate"] == 0.25


def test_masking_and_dropping():
    """Masked completions keep their place with weight 0; dropped groups leave batch and denominator."""
    masked = source_of(Script(), batch_size=8, mask_truncated=True).step_batches(0)
    weights = {int(t): float(w) for b in masked.micro_batches for t, w in zip(b["targets"], b["weights"], strict=True)}
    assert weights[3] == 0.0 and weights[2] == 0.5 and masked.denominator == 8
    dropped = source_of(Script(), batch_size=8, drop_zero_variance=True).step_batches(0)
    assert {int(t) for batch in dropped.micro_batches for t in batch["targets"]} == {2, 4}
    assert dropped.denominator == 4 and dropped.metrics["zero_variance_fraction"] == 0.5


def test_several_updates_share_a_rollout():
    script = Script()
    source = source_of(script, updates_per_rollout=2)
    updates = [int(source.step_batches(step).micro_batches[0]["update"]) for step in range(4)]
    assert updates == [0, 1, 0, 1] and len(script.requests) == 2
    assert script.requests[0] != script.requests[1]
    fresh = Script()
    source_of(fresh, updates_per_rollout=2).step_batches(2)
    assert fresh.requests == script.requests[1:]  # a resumed run asks the same


def test_samples_go_with_their_steps():
    source = source_of(Script(), samples_every=2, num_samples=3)
    samples = [source.step_batches(step).samples for step in range(3)]
    assert [[row["step"] for row in of_step] for of_step in samples] == [[1, 1, 1], [], [3, 3, 3]]
    assert samples[0][0].keys() >= {"problem_id", "completion", "gold", "extracted", "reward", "finish_reason"}
    again = source_of(Script(), samples_every=2, num_samples=3)
    assert again.step_batches(2).samples == samples[2], "a resumed run keeps the same"


def test_importance_sampling_needs_log_probabilities():
    with pytest.raises(StageError, match="importance_sampling=false"):
        source_of(Script(math.nan), importance_sampling=True).step_batches(0)


@pytest.mark.parametrize("changes, message", [
    ({"batch_size": 5}, "multiple of group_size"),
    ({"updates_per_rollout": 3, "checkpoint_every": 100}, "multiple of updates_per_rollout"),
])  # fmt: skip
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        RolloutConfig(**(BASE | changes))
