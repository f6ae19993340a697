from __future__ import annotations

import pytest
import torch
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.losses import ContrastiveLoss
from torch.nn.functional import normalize

from pml_extras.functional import (
    contextual_loss,
    contextual_similarity,
    contrastive_loss,
    mean_similarity_loss,
    pairwise_cosine,
)


def pair_masks(labels):
    same = labels[:, None] == labels
    return same & ~torch.eye(len(labels), dtype=torch.bool), ~same


def grad(loss, x):
    return torch.autograd.grad(loss, x)[0]


def test_golden(contextual_case, relative_error):
    case = contextual_case
    x, labels = case["embeddings"].requires_grad_(), case["labels"]

    loss = contextual_loss(pairwise_cosine(x), labels, int(case["k"]), case["eps"]).mean()
    assert relative_error(loss, case["contextual_loss"]) < 1e-4
    assert relative_error(grad(loss, x), case["contextual_grad"]) < 1e-4

    loss = contrastive_loss(pairwise_cosine(x), *pair_masks(labels), 0.75, 0.6).mean()
    assert relative_error(loss, case["contrastive_loss"]) < 1e-4
    assert relative_error(grad(loss, x), case["contrastive_grad"]) < 1e-4

    loss = mean_similarity_loss(x, 0.25)
    assert relative_error(loss, case["mean_similarity_loss"]) < 1e-4
    assert relative_error(grad(loss, x), case["mean_similarity_grad"]) < 1e-4


def test_contextual_term_is_the_squared_error_of_the_similarity():
    x, labels = torch.randn(12, 5, dtype=torch.float64), torch.arange(12) % 3
    s = contextual_similarity(pairwise_cosine(x), 4, 0.05)
    total = 0.0
    for i in range(12):
        for j in range(12):
            if i != j:
                wanted = 1.0 if labels[i] == labels[j] else 0.0
                total += float((s[i, j] - wanted) ** 2)
    loss = contextual_loss(pairwise_cosine(x), labels, 4, 0.05).mean()
    assert float(loss) == pytest.approx(total / 144, rel=1e-12)


@pytest.mark.parametrize("margins", [(0.75, 0.6), (1.0, 0.0), (-1.0, 1.0)])
def test_contrastive_term_is_pmls_contrastive_loss(margins, relative_error):
    x, labels = torch.randn(24, 6, dtype=torch.float64, requires_grad=True), torch.arange(24) % 5
    expected = ContrastiveLoss(*margins, distance=CosineSimilarity())(x, labels)
    actual = contrastive_loss(pairwise_cosine(x), *pair_masks(labels), *margins).mean()
    assert relative_error(actual, expected) < 1e-12 or actual == expected == 0
    assert torch.allclose(grad(actual, x), grad(expected, x), atol=1e-14)


def test_mean_similarity_is_over_all_pairs_and_self_pairs():
    x = torch.randn(9, 4, dtype=torch.float64)
    mean = (normalize(x) @ normalize(x).T).mean()
    assert float(mean_similarity_loss(x, 0.3)) == pytest.approx(float((mean - 0.3) ** 2), rel=1e-12)


def test_gradcheck_of_the_smooth_terms():
    x = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    masks = pair_masks(torch.arange(7) % 2)
    assert torch.autograd.gradcheck(mean_similarity_loss, x)
    assert torch.autograd.gradcheck(lambda x: contrastive_loss(pairwise_cosine(x), *masks), x)
    labels = torch.arange(7) % 2
    with torch.no_grad():  # and the loss is an even function of the similarity's errors
        s = pairwise_cosine(x)
        assert contextual_loss(s, labels).ge(0).all()


def test_half_precision_and_autocast_do_not_change_the_neighbourhoods():
    x = torch.randn(64, 16).bfloat16()
    labels = torch.arange(64) % 16
    expected = contextual_loss(pairwise_cosine(x.float()), labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(contextual_loss(pairwise_cosine(x), labels), expected)


def test_references_that_are_no_copies_all_count():
    x, references = torch.randn(6, 4), torch.randn(9, 4)
    labels, ref_labels = torch.arange(6) % 2, torch.arange(9) % 2
    given = pairwise_cosine(x, references), labels, 3, 0.05, pairwise_cosine(references), ref_labels
    none = torch.zeros(6, 9, dtype=torch.bool)
    assert torch.equal(contextual_loss(*given), contextual_loss(*given, none))
    context = contextual_similarity(given[0], 3, 0.05, given[4])
    expected = (context - (labels[:, None] == ref_labels).float()).square().mean(1)
    assert torch.allclose(contextual_loss(*given), expected)
