from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from helpers.golden import relative_error
from pml_extras.functional import contextual_similarity
from pml_extras.functional._contextual import _weighted_mean
from pml_extras.functional._neighborhoods import neighborhood_overlap


class Step(torch.autograd.Function):
    """The Heaviside function, with the authors' straight-through estimator in backward."""

    @staticmethod
    def forward(ctx, x):
        return (x >= 0).to(x.dtype)

    @staticmethod
    def backward(ctx, grad_output):
        return 10 * grad_output


def authors_similarity(embeddings: torch.Tensor, k: int, slack: float) -> torch.Tensor:
    """The authors' formulas, line by line."""
    x = normalize(embeddings)
    distances = (2 - 2 * x @ x.T).clamp_min(0)
    ordered = distances.detach().sort(1).values
    knn = Step.apply(ordered[:, k - 1 : k] + slack - distances)
    half_knn = Step.apply(ordered[:, k // 2 - 1 : k // 2] + slack - distances)
    size = knn.sum(1, keepdim=True).detach()
    inside = knn @ knn.T / size
    outside = (1 - knn) @ (1 - knn).T / (len(x) - size)
    weights = 0.5 * (inside + outside) * knn
    reciprocal = half_knn * half_knn.T
    # query expansion: the mean weights of the reciprocal neighbors
    expanded = reciprocal @ weights / reciprocal.sum(1, keepdim=True)
    return (expanded + expanded.T) / 2


def clustered(num_classes=6, per_class=5, dim=7, noise=0.6, dtype=torch.float64):
    centers = torch.randn(num_classes, dim, dtype=dtype).repeat_interleave(per_class, 0)
    return centers + noise * torch.randn_like(centers)


def squared_distances(x: torch.Tensor) -> torch.Tensor:
    return (2 - 2 * normalize(x) @ normalize(x).T).clamp_min(0)


def test_equals_the_golden_values(contextual_case):
    case = contextual_case
    similarity = contextual_similarity(
        squared_distances(case["embeddings"]),
        num_neighbors=int(case["k"]),
        slack=float(case["eps"]),
    )
    assert relative_error(similarity, case["similarity"]) < 1e-4


@pytest.mark.parametrize("k", [2, 3, 4, 7])
@pytest.mark.parametrize("slack", [0.0, 0.05, 0.3])
def test_equals_the_authors_formulas_with_gradient(k, slack):
    x = clustered().requires_grad_()
    # Not symmetric, so that errors do not cancel.
    weights = torch.randn(len(x), len(x), dtype=x.dtype)
    actual = contextual_similarity(squared_distances(x), num_neighbors=k, slack=slack)
    expected = authors_similarity(x, k, slack)
    assert relative_error(actual, expected) < 1e-12
    grads = [torch.autograd.grad((s * weights).sum(), x)[0] for s in (actual, expected)]
    assert relative_error(*grads) < 1e-10


def test_gradcheck_of_the_functions_of_the_masks():
    # Gradcheck cannot test the steps: their gradient is an estimate.
    knn_mask = torch.rand(5, 5, dtype=torch.float64, requires_grad=True)
    half_knn_mask = torch.rand(5, 5, dtype=torch.float64, requires_grad=True)

    def expanded(knn, half_knn):
        return _weighted_mean(half_knn * half_knn.T, (knn @ knn.T) * knn)

    assert torch.autograd.gradcheck(expanded, (knn_mask, half_knn_mask))

    def overlap(knn):
        size = knn.sum(1)
        return neighborhood_overlap(knn @ knn.T, size[:, None], size, len(knn))

    actual = torch.autograd.functional.jacobian(overlap, knn_mask)
    size = knn_mask.detach().sum(1, keepdim=True)  # the denominators get no gradient

    def with_fixed_denominators(knn):
        return (knn @ knn.T / size + (1 - knn) @ (1 - knn).T / (5 - size)) / 2

    expected = torch.autograd.functional.jacobian(with_fixed_denominators, knn_mask)
    assert torch.allclose(actual, expected, atol=1e-12)


def test_is_symmetric_and_between_zero_and_one():
    s = contextual_similarity(squared_distances(clustered()))
    assert torch.equal(s, s.T)
    assert s.min() >= 0
    assert s.max() <= 1 + 1e-12


def test_is_equivariant_to_permutation_and_invariant_to_scale():
    x = clustered()
    order = torch.randperm(len(x))
    s = contextual_similarity(squared_distances(x))
    shuffled = contextual_similarity(squared_distances(3 * x[order]))
    assert torch.allclose(shuffled, s[order][:, order])


def test_similarity_is_one_within_separate_clusters_and_zero_between():
    x = torch.eye(4).repeat_interleave(4, 0) + 0.01 * torch.randn(16, 4)
    labels = torch.arange(4).repeat_interleave(4)
    s = contextual_similarity(squared_distances(x))
    assert torch.equal(s, (labels[:, None] == labels).float())


@pytest.mark.parametrize("num_samples", [1, 2, 3, 5])
@pytest.mark.parametrize("k", [1, 2, 4, 100])
@pytest.mark.parametrize("slack", [0.0, 0.05, 4.0])
@pytest.mark.parametrize("equal", [True, False])
def test_is_finite_with_gradient_for_small_batches(num_samples, k, slack, equal):
    x = torch.ones(num_samples, 3) if equal else torch.randn(num_samples, 3)
    x.requires_grad_()
    s = contextual_similarity(squared_distances(x), num_neighbors=k, slack=slack)
    s.square().sum().backward()
    assert s.isfinite().all()
    assert x.grad.isfinite().all()


def test_queries_equal_to_the_references_give_the_result_of_the_batch():
    d = squared_distances(clustered(dtype=torch.float32)).fill_diagonal_(0)
    batch = contextual_similarity(d)
    queries = contextual_similarity(d, ref_distances=d)
    assert torch.allclose(batch, queries, atol=1e-6)


def test_a_distant_query_has_similarity_zero_to_all_references():
    references = torch.rand(8, 8) + torch.rand(8, 8).T
    far = torch.full((1, 8), 100.0)
    s = contextual_similarity(far, references + references.T, slack=0.0)
    assert torch.equal(s, torch.zeros(1, 8))


def test_without_slack_only_the_order_of_the_distances_matters():
    d = torch.rand(12, 12, dtype=torch.float64)
    d = d + d.T
    cubed = contextual_similarity(d**3 + 5, slack=0.0)
    assert torch.equal(contextual_similarity(d, slack=0.0), cubed)


def test_is_twice_differentiable():
    d = squared_distances(clustered()).requires_grad_()
    s = contextual_similarity(d)
    (grad,) = torch.autograd.grad(s.square().sum(), d, create_graph=True)
    assert torch.autograd.grad(grad.square().sum(), d)[0].isfinite().all()
