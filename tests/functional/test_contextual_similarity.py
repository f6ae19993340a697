from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from pml_extras.functional import contextual_similarity
from pml_extras.functional._contextual import _weighted_mean
from pml_extras.functional._neighborhoods import neighborhood_overlap


class Step(torch.autograd.Function):
    """The Heaviside function with a constant slope in backward, as the authors write it."""

    @staticmethod
    def forward(ctx, x):
        return (x >= 0).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        return 10 * grad


def authors_similarity(embeddings: torch.Tensor, k: int, slack: float) -> torch.Tensor:
    """The authors' formulas, line by line, with nine matrix products."""
    x = normalize(embeddings)
    d = (2 - 2 * x @ x.T).clamp_min(0)
    ordered = d.detach().sort(1).values
    m = Step.apply(ordered[:, k - 1 : k] + slack - d)
    m2 = Step.apply(ordered[:, k // 2 - 1 : k // 2] + slack - d)
    c = m.sum(1, keepdim=True).detach()
    inside = m @ m.T / c
    outside = (1 - m) @ (1 - m).T / (len(x) - c)
    w = 0.5 * (inside + outside) * m
    r = m2 * m2.T
    j = r @ w / r.sum(1, keepdim=True)
    return (j + j.T) / 2


def clustered(num_classes=6, per_class=5, dim=7, noise=0.6, dtype=torch.float64):
    centers = torch.randn(num_classes, dim, dtype=dtype).repeat_interleave(per_class, 0)
    return centers + noise * torch.randn_like(centers)


def squared_distances(x: torch.Tensor) -> torch.Tensor:
    return (2 - 2 * normalize(x) @ normalize(x).T).clamp_min(0)


def test_golden(contextual_case, relative_error):
    case = contextual_case
    similarity = contextual_similarity(
        squared_distances(case["embeddings"]),
        num_neighbors=int(case["k"]),
        slack=float(case["eps"]),
    )
    assert relative_error(similarity, case["similarity"]) < 1e-4


@pytest.mark.parametrize("k", [2, 3, 4, 7])
@pytest.mark.parametrize("slack", [0.0, 0.05, 0.3])
def test_equals_the_authors_formulas_with_gradient(k, slack, relative_error):
    x = clustered().requires_grad_()
    weights = torch.randn(len(x), len(x), dtype=x.dtype)  # not symmetric, so that no error cancels
    actual = contextual_similarity(squared_distances(x), num_neighbors=k, slack=slack)
    expected = authors_similarity(x, k, slack)
    assert relative_error(actual, expected) < 1e-12
    grads = [torch.autograd.grad((s * weights).sum(), x)[0] for s in (actual, expected)]
    assert relative_error(*grads) < 1e-10


def test_gradcheck_of_everything_after_the_steps():
    # The steps have no true derivative to compare with; what is computed from the masks has.
    knn_mask = torch.rand(5, 5, dtype=torch.float64, requires_grad=True)
    half_knn_mask = torch.rand(5, 5, dtype=torch.float64, requires_grad=True)

    def context(m, m2):
        return _weighted_mean(m2 * m2.T, (m @ m.T) * m)

    assert torch.autograd.gradcheck(context, (knn_mask, half_knn_mask))

    def overlap(m):
        return neighborhood_overlap(m @ m.T, m.sum(1, keepdim=True), m.sum(1), len(m))

    found = torch.autograd.functional.jacobian(overlap, knn_mask)
    c = knn_mask.detach().sum(1, keepdim=True)  # the denominators carry no gradient

    def with_fixed_denominators(m):
        return (m @ m.T / c + (1 - m) @ (1 - m).T / (5 - c)) / 2

    expected = torch.autograd.functional.jacobian(with_fixed_denominators, knn_mask)
    assert torch.allclose(found, expected, atol=1e-12)


def test_range_symmetry_and_self():
    s = contextual_similarity(squared_distances(clustered()))
    assert torch.equal(s, s.T)
    assert s.min() >= 0
    assert s.max() <= 1 + 1e-12


def test_invariant_to_permutation_and_scale():
    x = clustered()
    order = torch.randperm(len(x))
    s = contextual_similarity(squared_distances(x))
    shuffled = contextual_similarity(squared_distances(3 * x[order]))
    assert torch.allclose(shuffled, s[order][:, order])


def test_separate_clusters_have_similarity_zero_and_one():
    x = torch.eye(4).repeat_interleave(4, 0) + 0.01 * torch.randn(16, 4)
    labels = torch.arange(4).repeat_interleave(4)
    s = contextual_similarity(squared_distances(x))
    assert torch.equal(s, (labels[:, None] == labels).float())


@pytest.mark.parametrize("num_samples", [1, 2, 3, 5])
@pytest.mark.parametrize("k", [1, 2, 4, 100])
@pytest.mark.parametrize("slack", [0.0, 0.05, 4.0])
@pytest.mark.parametrize("equal", [True, False])
def test_finite_with_gradient_for_every_size(num_samples, k, slack, equal):
    x = torch.ones(num_samples, 3) if equal else torch.randn(num_samples, 3)
    x.requires_grad_()
    s = contextual_similarity(squared_distances(x), num_neighbors=k, slack=slack)
    s.square().sum().backward()
    assert s.isfinite().all()
    assert x.grad.isfinite().all()


def test_queries_that_are_the_references_get_the_similarities_of_the_batch():
    d = squared_distances(clustered(dtype=torch.float32)).fill_diagonal_(0)
    batch = contextual_similarity(d)
    queries = contextual_similarity(d, ref_distances=d)
    assert torch.allclose(batch, queries, atol=1e-6)


def test_a_query_out_of_reach_of_all_references_is_similar_to_none():
    references = torch.rand(8, 8) + torch.rand(8, 8).T
    far = torch.full((1, 8), 100.0)
    s = contextual_similarity(far, references + references.T, slack=0.0)
    assert torch.equal(s, torch.zeros(1, 8))


def test_without_slack_only_the_order_counts():
    d = torch.rand(12, 12, dtype=torch.float64)
    d = d + d.T
    cubed = contextual_similarity(d**3 + 5, slack=0.0)
    assert torch.equal(contextual_similarity(d, slack=0.0), cubed)


def test_it_can_be_differentiated_twice():
    d = squared_distances(clustered()).requires_grad_()
    s = contextual_similarity(d)
    (grad,) = torch.autograd.grad(s.square().sum(), d, create_graph=True)
    assert torch.autograd.grad(grad.square().sum(), d)[0].isfinite().all()
