from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.functional import normalize

from pml_extras.functional import pairwise_cosine
from pml_extras.functional.cosine import gram, unit_rows


def test_unit_rows_are_those_of_torch_with_their_gradients():
    x = torch.randn(6, 4, dtype=torch.float64) * torch.logspace(-14, 3, 6)[:, None]
    x[2] = 0
    weights = torch.randn(6, 4, dtype=torch.float64)
    results = []
    for function in (unit_rows, normalize):
        given = x.clone().requires_grad_()
        unit = function(given)
        (gradient,) = torch.autograd.grad((weights * unit).sum(), given)
        results.append((unit, gradient))
    assert torch.allclose(results[0][0], results[1][0])
    long = x.norm(dim=1) > 1e-12
    assert torch.allclose(results[0][1][long], results[1][1][long])
    assert torch.equal(results[0][1][2], results[1][1][2])


@pytest.mark.parametrize("shape", [(4, 3), (8, 2), (33, 2)])  # the products' backward has two ways
def test_derivatives(shape):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    for function in (unit_rows, gram, pairwise_cosine):
        assert gradcheck(function, x)
        assert gradgradcheck(function, x)


def test_one_set_is_two_equal_ones():
    x, y = torch.randn(5, 3), torch.randn(4, 3)
    assert torch.allclose(pairwise_cosine(x), pairwise_cosine(x, x.clone()))
    expected = torch.cosine_similarity(x[:, None], y, dim=2)
    assert torch.allclose(pairwise_cosine(x, y), expected, atol=1e-6)
