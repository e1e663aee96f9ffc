"""Kronecker transforms against the dense matrices that they stand for."""

import itertools

import pytest
import torch
from torch import Tensor

from quant.grids import chunks
from quant.transforms.kronecker import KroneckerTransform, WeightBasis, balanced_factors

A, B, NUM_OUT = 3, 4, 5
PARTS = list(itertools.product([True, False], repeat=3))
parts = pytest.mark.parametrize(("left", "right", "diagonal"), PARTS)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make(left: bool, right: bool, diagonal: bool, learned: bool = False) -> tuple[KroneckerTransform, Tensor]:
    """The transform and its dense matrix P, such that x -> x P."""
    left_AA, right_BB = random(A, A, seed=1) + 2 * torch.eye(A), random(B, B, seed=2) + 2 * torch.eye(B)
    diagonal_I = random(A * B, seed=3).abs() + 0.5
    transform = KroneckerTransform(
        left_AA if left else None, right_BB if right else None, diagonal_I if diagonal else None, learned=learned
    ).double()
    identity_A, identity_B = torch.eye(A, dtype=torch.float64), torch.eye(B, dtype=torch.float64)
    dense_II = torch.kron(left_AA if left else identity_A, right_BB if right else identity_B)
    return transform, (torch.diag(diagonal_I) if diagonal else torch.eye(A * B, dtype=torch.float64)) @ dense_II


@parts
def test_forward_is_the_dense_product(left: bool, right: bool, diagonal: bool) -> None:
    transform, dense_II = make(left, right, diagonal)
    x = random(2, 7, A * B)
    torch.testing.assert_close(transform(x), x @ dense_II, rtol=1e-12, atol=1e-12)


@parts
def test_weights_follow_so_that_outputs_stay(left: bool, right: bool, diagonal: bool) -> None:
    transform, dense_II = make(left, right, diagonal)
    x, w_OI = random(7, A * B), random(NUM_OUT, A * B, seed=9)
    torch.testing.assert_close(
        transform.inverse_transposed(w_OI), w_OI @ torch.linalg.inv(dense_II).T, rtol=1e-10, atol=1e-10
    )
    torch.testing.assert_close(transform(x) @ transform.inverse_transposed(w_OI).T, x @ w_OI.T, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(transform.inverse(transform(x)), x, rtol=1e-9, atol=1e-9)


@parts
def test_gradients_of_all_parts_are_right(left: bool, right: bool, diagonal: bool) -> None:
    transform, _ = make(left, right, diagonal, learned=True)
    names = [name for name, _ in transform.named_parameters()]
    x, w_OI = random(2, 3, A * B), random(NUM_OUT, A * B, seed=9)

    def outputs(x: Tensor, w_OI: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.nn.utils.stateless._reparametrize_module(transform, dict(zip(names, tensors, strict=True))):
            return transform(x), transform.inverse_transposed(w_OI), transform.inverse(x)

    tensors = (x, w_OI, *(parameter.detach().clone() for parameter in transform.parameters()))
    assert torch.autograd.gradcheck(outputs, tuple(tensor.requires_grad_() for tensor in tensors))


def test_gradients_of_bfloat16_inputs_are_those_of_float32_but_for_rounding() -> None:
    transform = make(True, True, True, learned=True)[0].float()
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        transform.zero_grad()
        x = random(64, A * B).to(torch.bfloat16).to(dtype).requires_grad_()
        transform(x).float().square().sum().backward()
        assert x.grad is not None and x.grad.dtype == dtype
        found[dtype] = [x.grad.float(), *(p.grad for p in transform.parameters() if p.grad is not None)]
    assert len(found[torch.float32]) == 4
    for exact, rounded in zip(*found.values(), strict=True):
        assert rounded.dtype == torch.float32
        assert float((rounded - exact).norm() / exact.norm()) < 2**-6


def test_the_product_keeps_its_input_only() -> None:
    transform, x, kept = make(True, True, True, learned=True)[0], random(6, A * B).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        transform(x)
    pointers = {tensor.data_ptr() for tensor in (x, *transform.parameters())}
    assert kept and {tensor.data_ptr() for tensor in kept} <= pointers


def test_autocast_changes_nothing() -> None:
    """Weights transformed in bf16 would not be those of the checkpoint."""
    transform, w_OI = make(True, True, True, learned=True)[0].float(), random(NUM_OUT, A * B, seed=9).float()
    results = []
    for enabled in (False, True):
        transform.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out_OI = transform(transform.inverse_transposed(w_OI) ** 2)
            out_OI.sum().backward()
        results.append([out_OI, *(parameter.grad for parameter in transform.parameters())])
    for plain, autocast in zip(*results, strict=True):
        assert plain.dtype == autocast.dtype == torch.float32 and torch.equal(plain, autocast)


def test_a_basis_takes_inputs_in_turn_and_the_output_with_the_bias() -> None:
    first, first_II = make(True, True, False)
    second, second_II = make(False, False, True)
    output = KroneckerTransform(right_BB=random(NUM_OUT, NUM_OUT, seed=4) + 3 * torch.eye(NUM_OUT)).double()
    basis = WeightBasis((first, second), output)
    x, w_OI, bias_O = random(7, A * B), random(NUM_OUT, A * B, seed=9), random(NUM_OUT, seed=8)
    transformed = x @ first_II @ second_II @ basis.weight(w_OI).T + basis.bias(bias_O)
    torch.testing.assert_close(transformed, output(x @ w_OI.T + bias_O), rtol=1e-9, atol=1e-9)


def test_condition_number_is_that_of_the_product() -> None:
    transform, _ = make(True, True, True)
    dense_II = torch.kron(transform.left, transform.right)
    assert transform.condition_number() == pytest.approx(float(torch.linalg.cond(dense_II)), rel=1e-9)


@pytest.mark.parametrize(
    ("size", "factors"),
    [
        (1024, (32, 32)),
        (1536, (32, 48)),
        (2560, (40, 64)),
        (3072, (48, 64)),
        (8960, (80, 112)),
        (9728, (76, 128)),
        (7, (1, 7)),
    ],
)
def test_balanced_factors(size: int, factors: tuple[int, int]) -> None:
    assert balanced_factors(size) == factors


@parts
def test_the_layout_of_the_input_does_not_matter(left: bool, right: bool, diagonal: bool) -> None:
    transform, x = make(left, right, diagonal, learned=True)[0], random(A * B, 6)
    found = []
    for input_NI in (x.T, x.T.contiguous()):
        input_NI = input_NI.detach().requires_grad_()
        out_NI = transform(input_NI)
        found.append([out_NI, *torch.autograd.grad(out_NI.square().sum(), [input_NI, *transform.parameters()])])
    for strided, contiguous in zip(*found, strict=True):
        torch.testing.assert_close(strided, contiguous, rtol=1e-12, atol=1e-12)


def test_chunks_change_nothing_but_the_last_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    transform, x = make(True, True, True, learned=True)[0], random(40, A * B)
    found = []
    for limit in (2**19, 3 * A * B * x.element_size()):
        monkeypatch.setattr(chunks, "CHUNK_BYTES_CPU", limit)
        leaf = x.clone().requires_grad_()
        out = transform(leaf)
        found.append([out, *torch.autograd.grad(out.square().sum(), [leaf, *transform.parameters()])])
    for whole, parted in zip(*found, strict=True):
        torch.testing.assert_close(whole, parted, rtol=1e-12, atol=1e-12)
