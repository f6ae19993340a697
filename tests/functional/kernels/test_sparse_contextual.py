from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from pml_extras.functional import contextual_similarity
from pml_extras.functional._kernels import sparse_contextual
from pml_extras.functional._kernels.sparse_contextual import (
    SparseContextualSimilarity,
    sparse_contextual_term,
)


def clustered(num_classes, per_class, dim, noise=0.6, dtype=torch.float64):
    labels = torch.arange(num_classes).repeat_interleave(per_class)
    x = torch.randn(num_classes, dim, dtype=dtype)[labels]
    order = torch.randperm(len(labels))
    return (x + noise * torch.randn_like(x))[order], labels[order]


def sparse_term(x, labels, k=4, slack=0.05):
    return sparse_contextual_term(normalize(x), labels, k, slack)


def reference_term(x, labels, k, slack):
    distances = (2 - 2 * normalize(x) @ normalize(x).T).clamp_min(0)
    s = contextual_similarity(distances, num_neighbors=k, slack=slack)
    errors = s - (labels[:, None] == labels).to(s.dtype)
    return errors.fill_diagonal_(0).square().mean(1)


def with_gradient(function, x, grad_output):
    loss = function(x)
    return loss, torch.autograd.grad((loss * grad_output).sum(), x)[0]


@pytest.mark.parametrize("shape", [(8, 4, 6), (20, 3, 12), (1, 15, 5), (15, 1, 5), (1, 1, 3)])
@pytest.mark.parametrize(("k", "slack"), [(1, 0.0), (2, 0.05), (4, 0.05), (5, 0.3), (99, 4.0)])
def test_equals_autograd_through_dense_matrices(shape, k, slack):
    x, labels = clustered(*shape)
    x.requires_grad_()
    grad_output = torch.rand(len(x), dtype=x.dtype)
    loss, grad = with_gradient(lambda x: sparse_term(x, labels, k, slack), x, grad_output)
    expected, expected_grad = with_gradient(
        lambda x: reference_term(x, labels, k, slack), x, grad_output
    )
    assert torch.allclose(loss, expected, rtol=1e-12, atol=1e-14)
    assert torch.allclose(grad, expected_grad, rtol=1e-9, atol=1e-13)


def test_is_finite_with_duplicates_and_zero_vectors():
    x, labels = clustered(6, 5, 4, dtype=torch.float32)
    x = torch.cat([x, x[:9], torch.zeros(2, 4)]).requires_grad_()
    labels = torch.cat([labels, labels[:9], torch.tensor([0, 1])])
    loss, grad = with_gradient(lambda x: sparse_term(x, labels), x, torch.ones(41))
    assert ((loss >= 0) & (loss <= 1)).all()
    assert grad.isfinite().all()


def test_chunks_do_not_change_the_result(monkeypatch):
    x, labels = clustered(10, 5, 6)
    expected = sparse_term(x, labels)
    monkeypatch.setattr(sparse_contextual, "CHUNK_NUMEL", 120)
    assert torch.equal(sparse_term(x, labels), expected)


def test_cannot_be_differentiated_twice():
    x, labels = clustered(4, 4, 5)
    loss = sparse_term(x.requires_grad_(), labels).sum()
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(loss, x, create_graph=True)


def test_backward_frees_what_forward_saved():
    x, labels = clustered(4, 4, 5)
    loss = sparse_term(x.requires_grad_(), labels).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@pytest.mark.parametrize("k", [1, 4, 60])
def test_sparse_similarity_equals_the_dense_one(k):
    x, _ = clustered(10, 5, 6)
    x = normalize(x)
    sparse = SparseContextualSimilarity(lambda rows: -x[rows] @ x.T, k, x)
    dense = contextual_similarity(-x @ x.T, num_neighbors=k, slack=0.0)
    y = torch.randn(50, 3, dtype=x.dtype)
    assert torch.allclose(sparse.to_dense(), dense)
    assert torch.allclose(sparse @ y, dense @ y)
    assert torch.allclose(sparse.diagonal(), dense.diagonal())
