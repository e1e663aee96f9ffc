import pytest
import torch

from quant.calibration.statistics import HessianAccumulator, dead_columns, exact_products


def plain_hessian(batches):
    """Mean over sequences of 2 x x^T, token by token in float64."""
    num_sequences = sum(len(x_BTI) for x_BTI, _ in batches)
    num_in = batches[0][0].shape[-1]
    hessian_II = torch.zeros(num_in, num_in, dtype=torch.float64)
    for x_BTI, mask_BT in batches:
        for b in range(x_BTI.shape[0]):
            for t in range(x_BTI.shape[1]):
                if mask_BT is None or mask_BT[b, t]:
                    x_I = x_BTI[b, t].double()
                    hessian_II += 2 * torch.outer(x_I, x_I) / num_sequences
    return hessian_II


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_in", [7, 300])
def test_matches_token_by_token_sum(dtype, num_in):
    generator = torch.Generator().manual_seed(0)
    batches = []
    for size in (3, 1, 2):
        x_BTI = torch.randn(size, 5, num_in, generator=generator).to(dtype)
        mask_BT = torch.rand(size, 5, generator=generator) < 0.7
        batches.append((x_BTI, mask_BT))
    batches.append((torch.randn(2, 4, num_in, generator=generator).to(dtype), None))
    accumulator = HessianAccumulator(num_in)
    for x_BTI, mask_BT in batches:
        accumulator.add(x_BTI, mask_BT)
    hessian_II = accumulator.hessian()
    assert torch.equal(hessian_II, hessian_II.T)
    torch.testing.assert_close(hessian_II.double(), plain_hessian(batches), rtol=1e-5, atol=1e-5)


def test_padding_may_hold_anything():
    x_BTI = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
    mask_BT = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    dirty_BTI = x_BTI.masked_fill(mask_BT[..., None] == 0, torch.nan)
    clean, dirty = HessianAccumulator(6), HessianAccumulator(6)
    clean.add(x_BTI, mask_BT)
    dirty.add(dirty_BTI, mask_BT)
    assert torch.equal(clean.hessian(), dirty.hessian())


def test_dead_columns():
    x_BTI = torch.ones(1, 3, 4)
    x_BTI[..., 2] = 0
    accumulator = HessianAccumulator(4)
    accumulator.add(x_BTI)
    assert dead_columns(accumulator.hessian()).tolist() == [False, False, True, False]


def test_refuses_nothing_and_nan():
    with pytest.raises(ValueError, match="not empty"):
        HessianAccumulator(4).hessian()
    accumulator = HessianAccumulator(4)
    accumulator.add(torch.full((1, 2, 4), torch.nan))
    with pytest.raises(ValueError, match="not finite"):
        accumulator.hessian()


def test_exact_products_restores_settings_also_after_an_error():
    torch.set_float32_matmul_precision("high")
    try:
        with pytest.raises(RuntimeError), exact_products(bfloat16_inputs=True):
            assert torch.get_float32_matmul_precision() == "highest"
            raise RuntimeError
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
