"""Hadamard matrices of the target models' sizes."""

import math

import pytest
import torch

from quant.transforms.hadamard import LARGEST_FACTOR, hadamard_factors, hadamard_matrix

SIZES = {
    "heads": (1, 2, 4, 12, 16, 28, 32, 40),
    "head size": (24, 32, 64, 80, 96, 128),
    "hidden": (576, 896, 1024, 1536, 2048, 2560, 3584, 4096, 5120),
    "intermediate": (768, 3072, 4864, 8960, 9728, 18944, 25600, 27648),
}
sizes = pytest.mark.parametrize("size", sorted({size for sizes in SIZES.values() for size in sizes}))


@sizes
def test_the_product_of_the_factors_is_an_orthonormal_hadamard_matrix(size: int) -> None:
    left_AA, right_BB = hadamard_factors(size)
    assert left_AA.shape[0] * right_BB.shape[0] == size
    assert max(left_AA.shape[0], right_BB.shape[0]) <= LARGEST_FACTOR
    for factor in (left_AA, right_BB):  # both properties pass on to the Kronecker product
        order = factor.shape[0]
        assert factor.dtype == torch.float64 and factor.shape == (order, order)
        assert torch.equal(factor.abs(), torch.full_like(factor, 1 / math.sqrt(order)))
        torch.testing.assert_close(factor @ factor.T, torch.eye(order, dtype=torch.float64), rtol=0, atol=1e-13)


def test_9728_is_76_times_128() -> None:
    assert [len(factor) for factor in hadamard_factors(9728)] == [76, 128]


@pytest.mark.parametrize("size", [12, 96, 152])
def test_the_matrix_is_the_product_element_by_element(size: int) -> None:
    (left_AA, right_BB), whole = hadamard_factors(size), hadamard_matrix(size)
    num_columns = len(right_BB)
    for i in range(size):
        for j in range(size):
            expected = left_AA[i // num_columns, j // num_columns] * right_BB[i % num_columns, j % num_columns]
            assert whole[i, j] == expected
    torch.testing.assert_close(whole @ whole.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-13)


@pytest.mark.parametrize("size", [3, 9, 14, 15, 1022, 2 * LARGEST_FACTOR**2])
def test_a_size_without_a_known_matrix_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"order {size} .*use a method without online rotations"):
        hadamard_factors(size)
