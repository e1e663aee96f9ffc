"""GPTQ against a plain float64 solution: no blocks, no Cholesky; the inverse Hessian is updated column by column."""

import pytest
import torch

from quant.grids.affine import LinearState, fake_quantize, grouped, minmax_grid, mse_grid, quantize, rtn
from quant.grids.scheme import Scheme
from quant.methods import gptq as module
from quant.methods.gptq import HessianError, gptq_shared, inverse_factor, relative_error
from quant.methods.options import GPTQOptions

ORDERS = {
    "act_order": {"act_order": True, "static_groups": True},
    "static": {"act_order": False, "static_groups": True},
    "dynamic": {"act_order": False, "static_groups": False},
}


def gptq(w_OI, hessian_II, scheme, **options):
    """Of one linear."""
    return gptq_shared({"": w_OI}, hessian_II, scheme, GPTQOptions(**options))[""]


def problem(num_out=24, num_in=256, seed=0, num_tokens=2000):
    generator = torch.Generator().manual_seed(seed)
    mix_II = torch.randn(num_in, num_in, generator=generator) * torch.logspace(0, -1.5, num_in)
    x_NI = torch.randn(num_tokens, num_in, generator=generator) @ mix_II
    w_OI = torch.randn(num_out, num_in, generator=generator) * 0.05
    return w_OI, 2 * x_NI.T @ x_NI / 10


def naive_gptq(w_OI, hessian_II, scheme, *, act_order, static_groups, mse_clip, damping=0.01):
    """Latents, codes, scales and zeros by the steps of arXiv 2210.17323, Eq. 2 and 3, in float64."""
    find = mse_grid if mse_clip else minmax_grid
    w_OI, hessian_II = w_OI.double().clone(), hessian_II.double().clone()
    num_in = w_OI.shape[1]
    dead_I = hessian_II.diagonal() == 0
    hessian_II[dead_I, dead_I] = 1
    w_OI[:, dead_I] = 0
    hessian_II += damping * hessian_II.diagonal().mean() * torch.eye(num_in, dtype=torch.float64)
    inverse_II = torch.linalg.inv(hessian_II)
    by_size = sorted(range(num_in), key=lambda i: -float(hessian_II[i, i]))
    order = by_size if act_order else list(range(num_in))
    scale_OG1, zero_OG1 = find(grouped(w_OI.float(), scheme), scheme)
    size = num_in // scale_OG1.shape[1]
    latent_OI = torch.zeros_like(w_OI)
    codes_OI = torch.zeros_like(w_OI)
    for i in order:
        group = i // size
        if not static_groups and i % size == 0:
            scale_O11, zero_O11 = find(w_OI[:, None, i : i + size].float(), scheme)
            scale_OG1[:, group], zero_OG1[:, group] = scale_O11[:, 0], zero_O11[:, 0]
        scale_O, zero_O = scale_OG1[:, group, 0].double(), zero_OG1[:, group, 0].double()
        latent_OI[:, i] = w_OI[:, i]
        codes_OI[:, i] = (torch.round(w_OI[:, i] / scale_O) + zero_O).clamp(scheme.qmin, scheme.qmax)
        error_O = (w_OI[:, i] - scale_O * (codes_OI[:, i] - zero_O)) / inverse_II[i, i]
        row_I = inverse_II[i].clone()
        w_OI -= torch.outer(error_O, row_I)
        inverse_II -= torch.outer(inverse_II[:, i].clone(), row_I) / row_I[i]
        inverse_II[i], inverse_II[:, i], inverse_II[i, i] = 0, 0, 1  # eliminated: later steps leave it alone
    return latent_OI, codes_OI, scale_OG1.squeeze(-1), zero_OG1.squeeze(-1)


def codes_of(state: LinearState, scheme):
    return quantize(grouped(state.weight, scheme), state.scale.unsqueeze(-1), state.zero.unsqueeze(-1), scheme).flatten(
        1
    )


@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_matches_naive_solution(order, group_size, symmetric):
    scheme = Scheme(3, group_size, symmetric=symmetric)
    w_OI, hessian_II = problem()
    result = gptq(w_OI, hessian_II, scheme, mse_clip=False, **ORDERS[order])
    latent_OI, codes_OI, scale_OG, zero_OG = naive_gptq(w_OI, hessian_II, scheme, mse_clip=False, **ORDERS[order])
    torch.testing.assert_close(result.state.scale, scale_OG, rtol=0, atol=0)
    torch.testing.assert_close(result.state.zero, zero_OG, rtol=0, atol=0)
    torch.testing.assert_close(result.state.weight.double(), latent_OI, rtol=0, atol=1e-5)
    assert torch.equal(codes_of(result.state, scheme).double(), codes_OI)


@pytest.mark.parametrize("order", ORDERS)
def test_matches_naive_solution_with_mse_clip_and_dead_columns(order):
    scheme = Scheme(2, 64, symmetric=False)
    w_OI, hessian_II = problem(seed=1)
    dead = [0, 70, 255]
    hessian_II[dead], hessian_II[:, dead] = 0, 0
    result = gptq(w_OI, hessian_II, scheme, **ORDERS[order])
    latent_OI, codes_OI, _, _ = naive_gptq(w_OI, hessian_II, scheme, mse_clip=True, **ORDERS[order])
    torch.testing.assert_close(result.state.weight.double(), latent_OI, rtol=0, atol=1e-5)
    assert torch.equal(codes_of(result.state, scheme).double(), codes_OI)
    assert result.num_dead == 3
    assert not result.state.weight[:, dead].any()


def test_small_groups_inside_a_block_are_not_stale():
    """The dynamic grid of a later group must see the updates of earlier ones, whatever the block size."""
    scheme = Scheme(3, 32, symmetric=False)
    w_OI, hessian_II = problem()
    states = [
        gptq(w_OI, hessian_II, scheme, act_order=False, static_groups=False, block_size=size).state
        for size in (1, 32, 48, 128, 1000)
    ]
    for state in states[1:]:
        torch.testing.assert_close(state.scale, states[0].scale, rtol=0, atol=0)
        assert torch.equal(codes_of(state, scheme), codes_of(states[0], scheme))


@pytest.mark.parametrize("order", ORDERS)
def test_latent_on_its_grid_gives_the_codes_of_the_loop_bit_for_bit(order, monkeypatch):
    scheme = Scheme(3, 32, symmetric=False)
    w_OI, hessian_II = problem()
    errors = []
    original = module._rounding_error

    def recording(w_O, scale_O, zero_O, scheme, *, out_O):
        result_O = original(w_O, scale_O, zero_O, scheme, out_O=out_O)
        errors.append(result_O.clone())
        return result_O

    monkeypatch.setattr(module, "_rounding_error", recording)
    state = gptq(w_OI, hessian_II, scheme, **ORDERS[order]).state
    codes_OGK = grouped(codes_of(state, scheme).float(), scheme)
    rounded_OI = ((codes_OGK - state.zero.unsqueeze(-1)) * state.scale.unsqueeze(-1)).flatten(1)
    by_size = torch.argsort(hessian_II.diagonal(), descending=True, stable=True)
    order_I = by_size if order == "act_order" else torch.arange(w_OI.shape[1])
    assert torch.equal(torch.stack(errors, 1), (state.weight - rounded_OI)[:, order_I])


def test_better_than_rounding_to_nearest():
    w_OI, hessian_II = problem()
    for scheme in (Scheme(3, 128), Scheme(2, 64, symmetric=False)):
        plain = rtn(w_OI, scheme)
        rounded_OI = fake_quantize(plain.weight, plain.scale, plain.zero, scheme, torch.float32)
        for order in ORDERS.values():
            result = gptq(w_OI, hessian_II, scheme, **order)
            assert result.error < 0.7 * relative_error(w_OI, rounded_OI, hessian_II)


def test_reported_error_is_the_output_error():
    generator = torch.Generator().manual_seed(0)
    x_NI, w_OI = torch.randn(500, 64, generator=generator), torch.randn(8, 64, generator=generator)
    scheme = Scheme(3, 32)
    result = gptq(w_OI, 2 * x_NI.T @ x_NI, scheme)
    state = result.state
    rounded_OI = fake_quantize(state.weight, state.scale, state.zero, scheme, torch.float32)
    outputs = [(x_NI.double() @ w.double().T).square().sum() for w in (w_OI - rounded_OI, w_OI)]
    assert result.error == pytest.approx(float(outputs[0] / outputs[1]), rel=1e-4)


def test_shared_solution_equals_separate_ones():
    scheme = Scheme(3, 64, symmetric=False)
    w_OI, hessian_II = problem()
    shared = gptq_shared({"q": w_OI[:16], "k": w_OI[16:]}, hessian_II, scheme, GPTQOptions())
    for name, part_OI in (("q", w_OI[:16]), ("k", w_OI[16:])):
        alone = gptq(part_OI, hessian_II, scheme)
        assert torch.equal(codes_of(shared[name].state, scheme), codes_of(alone.state, scheme))
        assert shared[name].error == pytest.approx(alone.error, rel=1e-4)


def test_singular_hessian_is_retried_and_recorded():
    w_OI, _ = problem(num_in=64)
    x_NI = torch.randn(10, 64, generator=torch.Generator().manual_seed(3))
    hessian_II = x_NI.T @ x_NI
    hessian_II -= 0.05 * hessian_II.diagonal().mean() * torch.eye(64)  # indefinite, as rounding can make it
    before_II = hessian_II.clone()
    result = gptq(w_OI, hessian_II, Scheme(3, 32), damping=0.01)
    assert (result.damping_used, result.num_retries) == (0.1, 1)
    assert torch.equal(hessian_II, before_II)
    none_I = torch.zeros(64, dtype=torch.bool)
    factor_II, damping, num_retries = inverse_factor(hessian_II, none_I, torch.arange(64), 0.0)
    assert (damping, num_retries) == (0.1, 3)
    damped_II = hessian_II.double() + 0.1 * hessian_II.double().diagonal().mean() * torch.eye(64)
    torch.testing.assert_close(factor_II.T @ factor_II @ damped_II, torch.eye(64, dtype=torch.float64))
    assert torch.equal(factor_II, factor_II.triu())


def test_hopeless_hessian_is_an_error_not_rounding_to_nearest():
    w_OI, hessian_II = problem(num_in=64)
    with pytest.raises(HessianError, match="not positive definite"):
        gptq(w_OI, hessian_II - 10 * hessian_II.diagonal().max() * torch.ones(64, 64), Scheme(3, 32))


def test_refusals():
    w_OI, hessian_II = problem(num_in=64)
    with pytest.raises(ValueError, match="static_groups=True"):
        gptq(w_OI, hessian_II, Scheme(3, 32), static_groups=False)
    gptq(w_OI, hessian_II, Scheme(3), static_groups=False)  # one group: the order of its columns does not matter
    with pytest.raises(ValueError, match="damping"):
        gptq(w_OI, hessian_II, Scheme(3, 32), damping=2.0)
    with pytest.raises(ValueError, match="block_size"):
        gptq(w_OI, hessian_II, Scheme(3, 32), block_size=0)
    with pytest.raises(ValueError, match="infinities"):
        gptq(w_OI / 0, hessian_II, Scheme(3, 32))
