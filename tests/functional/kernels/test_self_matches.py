from __future__ import annotations

import pytest
import torch

from pml_extras.functional._kernels.self_matches import row_hashes, self_match_mask


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_rows_match_if_all_bits_are_equal(dtype):
    x = torch.randn(40, 6, dtype=dtype).round()
    references = torch.cat([x[::3], -x, x.flip(1), torch.randn(5, 6, dtype=dtype)])
    expected = (x[:, None] == references).all(2)
    both_zeros = (
        (x[:, None] == 0) & (references == 0) & (x[:, None].signbit() ^ references.signbit())
    )
    assert torch.equal(self_match_mask(x, references), expected & ~both_zeros.any(2))


def test_rows_with_changed_signs_do_not_match():
    x = torch.randn(8, 8, dtype=torch.float64)
    assert not self_match_mask(x, -x).any()
    assert not self_match_mask(x, x * torch.tensor([-1, -1, 1, 1, 1, 1, 1, 1])).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [7, 8])
def test_hashes_of_half_precision_equal_those_of_the_same_float32_numbers(dtype, size):
    x = torch.randn(5, size, dtype=dtype)
    assert torch.equal(row_hashes(x), row_hashes(x.float()))
