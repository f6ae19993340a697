from __future__ import annotations

import functools

import pytest
import torch
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.losses import ContrastiveLoss
from torch.nn.functional import normalize

from helpers.golden import relative_error
from pml_extras.functional import contextual_loss, contextual_similarity, pairwise_cosine
from pml_extras.functional._kernels.sparse_contextual import (
    prefers_sparse,
    squared_distance_rows,
)

IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["sparse", "reference"])


def grad(loss, x):
    return torch.autograd.grad(loss, x)[0]


def clustered(num_classes, per_class, dim, noise=0.6, dtype=torch.float64):
    labels = torch.arange(num_classes).repeat_interleave(per_class)
    x = torch.randn(num_classes, dim, dtype=dtype)[labels]
    order = torch.randperm(len(labels))
    return (x + noise * torch.randn_like(x))[order], labels[order]


@IMPLEMENTATIONS
def test_equals_the_golden_values(contextual_case, implementation):
    case = contextual_case
    x = case["embeddings"].requires_grad_()
    terms = contextual_loss(
        x,
        case["labels"],
        num_neighbors=int(case["k"]),
        slack=float(case["eps"]),
        implementation=implementation,
    )
    for name, term in {
        "contextual": terms.contextual.mean(),
        "contrastive": terms.contrastive.mean(),
        "mean_similarity": terms.similarity,
    }.items():
        assert relative_error(term, case[f"{name}_loss"]) < 1e-4
        actual = torch.autograd.grad(term, x, retain_graph=True)[0]
        assert relative_error(actual, case[f"{name}_grad"]) < 1e-4


@IMPLEMENTATIONS
def test_contextual_term_is_the_mean_squared_error_of_the_similarity(implementation):
    x, labels = torch.randn(12, 5, dtype=torch.float64), torch.arange(12) % 3
    s = contextual_similarity(2 - 2 * pairwise_cosine(x))
    sum_of_errors = 0.0
    for i in range(12):
        for j in range(12):
            if i != j:
                target = 1.0 if labels[i] == labels[j] else 0.0
                sum_of_errors += float((s[i, j] - target) ** 2)
    loss = contextual_loss(x, labels, implementation=implementation).contextual.mean()
    assert float(loss) == pytest.approx(sum_of_errors / 144, rel=1e-12)


@IMPLEMENTATIONS
@pytest.mark.parametrize("margins", [(0.75, 0.6), (1.0, 0.0), (-1.0, 1.0)])
def test_contrastive_term_equals_pml_contrastive_loss(margins, implementation):
    x, labels = torch.randn(24, 6, dtype=torch.float64, requires_grad=True), torch.arange(24) % 5
    expected = ContrastiveLoss(*margins, distance=CosineSimilarity())(x, labels)
    actual = contextual_loss(
        x, labels, pos_margin=margins[0], neg_margin=margins[1], implementation=implementation
    ).contrastive.mean()
    assert relative_error(actual, expected) < 1e-12 or actual == expected == 0
    assert torch.allclose(grad(actual, x), grad(expected, x), atol=1e-14)


def test_mean_similarity_is_over_all_pairs_including_self_pairs():
    x, labels = torch.randn(9, 4, dtype=torch.float64), torch.arange(9)
    mean = (normalize(x) @ normalize(x).T).mean()
    loss = contextual_loss(x, labels, target_similarity=0.3).similarity
    assert float(loss) == pytest.approx(float((mean - 0.3) ** 2), rel=1e-12)


@IMPLEMENTATIONS
def test_gradcheck_of_the_smooth_terms(implementation):
    x, labels = torch.randn(7, 3, dtype=torch.float64, requires_grad=True), torch.arange(7) % 2
    loss = functools.partial(contextual_loss, labels=labels, implementation=implementation)
    assert torch.autograd.gradcheck(lambda x: loss(x).similarity, x)
    assert torch.autograd.gradcheck(lambda x: loss(x).contrastive, x)
    assert loss(x).contextual.ge(0).all()


def test_half_precision_and_autocast_do_not_change_the_neighborhoods():
    x = torch.randn(64, 16).bfloat16()
    labels = torch.arange(64) % 16
    expected = contextual_loss(x.float(), labels).contextual
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(contextual_loss(x, labels).contextual, expected)


def test_self_matches_among_the_references_are_left_out():
    x, references = torch.randn(6, 4), torch.randn(9, 4)
    labels, ref_labels = torch.arange(6) % 2, torch.arange(9) % 2
    loss = functools.partial(contextual_loss, num_neighbors=3)

    def squared_errors(references):
        s = contextual_similarity(
            2 - 2 * pairwise_cosine(x, references),
            2 - 2 * pairwise_cosine(references),
            num_neighbors=3,
        )
        return (s - (labels[:, None] == ref_labels).float()).square()

    actual = loss(x, labels, references, ref_labels).contextual
    assert torch.allclose(actual, squared_errors(references).mean(1))
    references[4] = x[0]
    expected = squared_errors(references)
    expected[0, 4] = 0
    assert torch.allclose(loss(x, labels, references, ref_labels).contextual, expected.mean(1))


def test_pair_weights_repeat_pairs():
    x, labels = torch.randn(8, 4, dtype=torch.float64), torch.arange(8) % 2
    positives, negatives = torch.randint(3, (2, 8, 8)).double()
    excess = (0.75 - pairwise_cosine(x)).relu(), (pairwise_cosine(x) - 0.6).relu()
    expected = sum(
        float((e * w).sum() / (w * (e > 0)).sum().clamp_min(1))
        for e, w in zip(excess, (positives, negatives), strict=True)
    )
    for implementation in ("sparse", "reference"):
        terms = contextual_loss(
            x, labels, pair_weights=(positives, negatives), implementation=implementation
        )
        assert float(terms.contrastive.mean()) == pytest.approx(expected)


def test_auto_prefers_sparse_for_small_neighborhoods_and_classes():
    if not torch.backends.mkl.is_available():
        pytest.skip("torch is built without the sparse products of MKL")

    def is_sparse(x, labels, slack=0.05):
        x = normalize(x)
        return prefers_sparse(squared_distance_rows(x), 4, slack, x, labels)

    x, labels = clustered(150, 4, 32, dtype=torch.float32)
    assert is_sparse(x, labels)
    assert not is_sparse(x[:200], labels[:200])  # a small batch
    assert not is_sparse(x, labels % 3)  # large classes
    assert not is_sparse(x, labels, slack=1.5)  # large neighborhoods
    assert not is_sparse(torch.ones_like(x), labels)  # one neighborhood of all


def test_sparse_does_not_support_references():
    x, labels = torch.randn(6, 4), torch.arange(6) % 2
    with pytest.raises(ValueError, match="does not support ref_emb"):
        contextual_loss(x, labels, x.clone(), labels, implementation="sparse")


@IMPLEMENTATIONS
def test_an_empty_batch_has_empty_losses(implementation):
    x, labels = torch.empty(0, 3, requires_grad=True), torch.empty(0).long()
    terms = contextual_loss(x, labels, implementation=implementation)
    assert terms.contextual.shape == terms.contrastive.shape == (0,)
    assert terms.similarity == 0
