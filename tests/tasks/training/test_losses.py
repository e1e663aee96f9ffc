"""Chunked losses against the same formulas over full logits in float64, and the law of their memory."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tasks.training.losses import cross_entropy, entropy, head_loss, kl_divergence, kl_top_k, token_log_probability

N, H, V = 23, 16, 40
CHUNK = 5


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "hidden": normal(N, H).requires_grad_(),
        "weight": (normal(V, H) / 2).requires_grad_(),
        "teacher": normal(N, H),
        "teacher_weight": normal(V, H) / 2,
        "targets": torch.randint(V, (N,), generator=generator),
    }


def plain_kl(p: Tensor, q: Tensor) -> Tensor:
    """Sum over tokens of KL(p || q), entry by entry, of probabilities."""
    total = torch.zeros((), dtype=torch.float64)
    for row in range(p.shape[0]):
        for entry in range(p.shape[1]):
            total = total + p[row, entry] * (p[row, entry].log() - q[row, entry].log())
    return total


def check(tensors: dict[str, Tensor], chunk_loss, expected: Tensor) -> None:
    """Value and both gradients, the outer gradient being 3."""
    hidden, weight = tensors["hidden"], tensors["weight"]
    wanted = torch.autograd.grad(3 * expected, (hidden, weight))
    loss, _ = head_loss(hidden, weight, chunk_loss, CHUNK)
    found = torch.autograd.grad(3 * loss, (hidden, weight))
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_cross_entropy(tensors):
    logits = tensors["hidden"] @ tensors["weight"].T
    expected = torch.nn.functional.cross_entropy(logits, tensors["targets"], reduction="sum")
    check(tensors, cross_entropy(tensors["targets"]), expected)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_kl(tensors, direction, temperature):
    student = (tensors["hidden"] @ tensors["weight"].T / temperature).softmax(-1)
    teacher = (tensors["teacher"] @ tensors["teacher_weight"].T / temperature).softmax(-1)
    expected = plain_kl(teacher, student) if direction == "forward" else plain_kl(student, teacher)
    chunk_loss = kl_divergence(tensors["teacher"], tensors["teacher_weight"], direction, temperature)
    check(tensors, chunk_loss, expected * temperature**2)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("k", [1, 7, V])
def test_kl_to_cached_top_k(tensors, direction, k):
    """The reference lumps all entries but the k largest of the teacher into one."""
    student = (tensors["hidden"] @ tensors["weight"].T).softmax(-1)
    teacher = (tensors["teacher"] @ tensors["teacher_weight"].T).softmax(-1)
    values, indices = teacher.log().topk(k, dim=-1)

    def lumped(p: Tensor) -> Tensor:
        known = p.gather(-1, indices)
        return known if k == V else torch.cat([known, 1 - known.sum(-1, keepdim=True)], -1)

    p, q = lumped(teacher), lumped(student)
    expected = plain_kl(p, q) if direction == "forward" else plain_kl(q, p)
    check(tensors, kl_top_k(values, indices.int(), direction), expected)
    full = plain_kl(teacher, student) if direction == "forward" else plain_kl(student, teacher)
    if k == V:
        torch.testing.assert_close(expected, full)
    else:
        assert expected < full


def test_top_k_that_holds_all_mass_is_finite():
    """A teacher so sure that 1 - sum rounds to 0 in fp32 leaves loss and gradient finite."""
    hidden = torch.randn(3, H, requires_grad=True)
    values = torch.log_softmax(torch.tensor([[100.0, 0.0]] * 3), -1)
    for direction in ("forward", "reverse"):
        chunk_loss = kl_top_k(values, torch.tensor([[0, 1]] * 3), direction)
        loss, _ = head_loss(hidden, torch.randn(V, H), chunk_loss)
        (gradient,) = torch.autograd.grad(loss, hidden)
        assert loss.isfinite() and gradient.isfinite().all()


def test_frozen_head_gets_no_gradient_and_chunks_do_not_matter(tensors):
    weight = tensors["weight"].detach()
    losses = [head_loss(tensors["hidden"], weight, cross_entropy(tensors["targets"]), c)[0] for c in (1, 7, N)]
    gradients = [torch.autograd.grad(loss, tensors["hidden"])[0] for loss in losses]
    for loss, gradient in zip(losses[1:], gradients[1:], strict=True):
        torch.testing.assert_close(loss, losses[0])
        torch.testing.assert_close(gradient, gradients[0])
    assert weight.grad is None


def test_statistics_cover_every_token_and_stay_outside_the_graph(tensors):
    def chunk_loss(logits_CV, tokens):
        value = token_log_probability(logits_CV, tensors["targets"][tokens])
        return -value, {"logprob": value.detach(), "entropy": entropy(logits_CV.detach())}

    _, statistics = head_loss(tensors["hidden"], tensors["weight"], chunk_loss, CHUNK)
    log_p = torch.log_softmax(tensors["hidden"] @ tensors["weight"].T, -1).detach()
    expected = torch.stack([log_p[i, target] for i, target in enumerate(tensors["targets"])])
    torch.testing.assert_close(statistics["logprob"], expected)
    torch.testing.assert_close(statistics["entropy"], torch.distributions.Categorical(logits=log_p).entropy())
    assert not statistics["logprob"].requires_grad


def test_no_token_is_a_loss_of_zero(tensors):
    loss, _ = head_loss(tensors["hidden"][:0], tensors["weight"], cross_entropy(tensors["targets"][:0]))
    assert loss.item() == 0.0


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns, and the largest fp32 one."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor):
                self.largest = max(self.largest, value.numel())
        return result


@pytest.mark.parametrize("which", ["cross_entropy", "kl", "top_k"])
@pytest.mark.parametrize("autocast", [False, True])
def test_no_tensor_has_all_tokens_and_all_entries(which, autocast):
    """Neither forward nor backward makes a tensor larger than the head, the hidden states or one chunk's logits."""
    num, entries, chunk = 512, 300, 8
    hidden = torch.randn(num, H, requires_grad=True)
    weight = torch.randn(entries, H, requires_grad=True)
    losses = {
        "cross_entropy": cross_entropy(torch.zeros(num, dtype=torch.long)),
        "kl": kl_divergence(torch.randn(num, H), torch.randn(entries, H)),
        "top_k": kl_top_k(torch.full((num, 4), -2.0), torch.arange(4).expand(num, 4)),
    }
    with LargestTensor() as mode:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss, _ = head_loss(hidden, weight, losses[which], chunk)
        loss.backward()
    assert mode.largest <= max(num * H, entries * H, chunk * entries) < num * entries / 15
    assert hidden.grad is not None and weight.grad is not None


def test_autocast_rounds_logits_as_an_engine_does(tensors):
    """Under bf16 autocast the logits are those of a bf16 matmul; all that follows is fp32."""
    hidden, weight = tensors["hidden"].detach().float(), tensors["weight"].detach().float()
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = head_loss(hidden, weight, cross_entropy(tensors["targets"]))
    logits = (hidden.bfloat16() @ weight.bfloat16().T).float()
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, tensors["targets"], reduction="sum"))
    assert loss.dtype == torch.float32
