from __future__ import annotations

import torch
from torch.autograd import gradcheck, gradgradcheck

from pml_extras.functional import pairwise_cosine


def test_gradcheck():
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    y = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert gradcheck(pairwise_cosine, x)
    assert gradgradcheck(pairwise_cosine, x)
    assert gradcheck(pairwise_cosine, (x, y))
    assert gradgradcheck(pairwise_cosine, (x, y))


def test_equals_torch_cosine_similarity():
    x, y = torch.randn(5, 3), torch.randn(4, 3)
    assert torch.allclose(pairwise_cosine(x), pairwise_cosine(x, x.clone()))
    expected = torch.cosine_similarity(x[:, None], y, dim=2)
    assert torch.allclose(pairwise_cosine(x, y), expected, atol=1e-6)


def test_a_zero_vector_has_similarity_zero_and_a_finite_gradient():
    x = torch.cat([torch.zeros(1, 3), torch.randn(2, 3)]).requires_grad_()
    cosines = pairwise_cosine(x)
    assert torch.equal(cosines[0], torch.zeros(3))
    cosines.sum().backward()
    assert x.grad.isfinite().all()
