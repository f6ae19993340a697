from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from pml_extras.functional import contextual_similarity, contextual_similarity_from_distances
from pml_extras.functional.contextual_similarity import (
    STEP_SLOPE,
    _average_over,
    agreement,
)


class Step(torch.autograd.Function):
    """The Heaviside function with a constant slope in backward, as the authors write it."""

    @staticmethod
    def forward(ctx, x):
        return (x >= 0).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad * STEP_SLOPE


def plain_similarity(embeddings: torch.Tensor, k: int, slack: float) -> torch.Tensor:
    """The formulas, line by line, nine matrix products and all."""
    x = normalize(embeddings)
    d = (2 - 2 * x @ x.T).clamp_min(0)
    ordered = d.detach().sort(1).values
    m = Step.apply(ordered[:, k - 1 : k] + slack - d)
    m2 = Step.apply(ordered[:, k // 2 - 1 : k // 2] + slack - d)
    c = m.sum(1, keepdim=True).detach()
    inter = m @ m.T / c
    outside = (1 - m) @ (1 - m).T / (len(x) - c)
    w = 0.5 * (inter + outside) * m
    r = m2 * m2.T
    j = r @ w / r.sum(1, keepdim=True)
    return (j + j.T) / 2


def clustered(num_classes=6, per_class=5, dim=7, noise=0.6, dtype=torch.float64):
    centers = torch.randn(num_classes, dim, dtype=dtype).repeat_interleave(per_class, 0)
    return centers + noise * torch.randn_like(centers)


def cosine(x: torch.Tensor) -> torch.Tensor:
    return normalize(x) @ normalize(x).T


def test_golden(contextual_case, relative_error):
    case = contextual_case
    similarity = contextual_similarity(cosine(case["embeddings"]), int(case["k"]), case["eps"])
    assert relative_error(similarity, case["similarity"]) < 1e-4


@pytest.mark.parametrize("k", [2, 3, 4, 7])
@pytest.mark.parametrize("slack", [0.0, 0.05, 0.3])
def test_equals_the_plain_formulas_with_gradient(k, slack, relative_error):
    x = clustered().requires_grad_()
    weights = torch.randn(len(x), len(x), dtype=x.dtype)  # no symmetry for errors to hide behind
    actual, expected = contextual_similarity(cosine(x), k, slack), plain_similarity(x, k, slack)
    assert relative_error(actual, expected) < 1e-12
    grads = [torch.autograd.grad((s * weights).sum(), x)[0] for s in (actual, expected)]
    assert relative_error(*grads) < 1e-10


def test_gradcheck_of_everything_behind_the_steps():
    # The steps have no derivative to compare with; what is built on the masks has.
    near = torch.rand(5, 5, dtype=torch.float64, requires_grad=True)
    nearest = torch.rand(5, 5, dtype=torch.float64, requires_grad=True)

    def differentiable_part(near, nearest):
        return _average_over(nearest * nearest.T, (near @ near.T) * near)

    assert torch.autograd.gradcheck(differentiable_part, (near, nearest))

    def agreement_of(m):
        return agreement(m @ m.T, m.sum(1, keepdim=True), m.sum(1), len(m))

    found = torch.autograd.functional.jacobian(agreement_of, near)
    held = near.detach().sum(1, keepdim=True)  # the denominators carry no gradient

    def with_fixed_denominators(m):
        return (m @ m.T / held + (1 - m) @ (1 - m).T / (5 - held)) / 2

    expected = torch.autograd.functional.jacobian(with_fixed_denominators, near)
    assert torch.allclose(found, expected, atol=1e-12)


def test_range_symmetry_and_self():
    s = contextual_similarity(cosine(clustered()), 4, 0.05)
    assert torch.equal(s, s.T)
    assert s.min() >= 0
    assert s.max() <= 1 + 1e-12


def test_invariant_to_permutation_and_scale():
    x = clustered()
    order = torch.randperm(len(x))
    s = contextual_similarity(cosine(x), 4)
    shuffled = contextual_similarity(cosine(3 * x[order]), 4)
    assert torch.allclose(shuffled, s[order][:, order])


def test_separate_clusters_are_told_apart_exactly():
    x = torch.eye(4).repeat_interleave(4, 0) + 0.01 * torch.randn(16, 4)
    labels = torch.arange(4).repeat_interleave(4)
    s = contextual_similarity(cosine(x), 4, 0.05)
    assert torch.equal(s, (labels[:, None] == labels).float())


@pytest.mark.parametrize("num_samples", [1, 2, 3, 5])
@pytest.mark.parametrize("k", [1, 2, 4, 100])
@pytest.mark.parametrize("slack", [0.0, 0.05, 4.0])
@pytest.mark.parametrize("equal", [True, False])
def test_finite_with_gradient_for_every_size_and_neighbourhood(num_samples, k, slack, equal):
    x = torch.ones(num_samples, 3) if equal else torch.randn(num_samples, 3)
    x.requires_grad_()
    s = contextual_similarity(cosine(x), k, slack)
    s.square().sum().backward()
    assert s.isfinite().all()
    assert x.grad.isfinite().all()


def test_queries_that_are_the_references_see_what_the_batch_sees():
    x = clustered(dtype=torch.float32)
    s = cosine(x)
    d = (2 - 2 * s).fill_diagonal_(0)
    batch = contextual_similarity_from_distances(d, 4, 0.05)
    query = contextual_similarity_from_distances(d, 4, 0.05, ref_distances=d)
    assert torch.allclose(batch, query, atol=1e-6)


def test_a_query_outside_all_references_reach_is_similar_to_none():
    references = torch.rand(8, 8) + torch.rand(8, 8).T
    far = torch.full((1, 8), 100.0)
    s = contextual_similarity_from_distances(far, 4, ref_distances=(references + references.T))
    assert torch.equal(s, torch.zeros(1, 8))


def test_rows_compare_by_order_alone_without_slack():
    d = torch.rand(12, 12, dtype=torch.float64)
    d = d + d.T
    cubed = contextual_similarity_from_distances(d**3 + 5, 4)
    assert torch.equal(contextual_similarity_from_distances(d, 4), cubed)
