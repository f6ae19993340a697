from __future__ import annotations

import sys

import pytest
import torch

from pml_extras.functional import (
    contextual_loss,
    pairwise_cosine,
    sparse_contextual_loss,
    sparse_pays,
)
from pml_extras.functional.sparse_context import sparse_context


def clustered(num_classes, per_class, dim, noise=0.6, dtype=torch.float64):
    labels = torch.arange(num_classes).repeat_interleave(per_class)
    x = torch.randn(num_classes, dim, dtype=dtype)[labels]
    order = torch.randperm(len(labels))
    return (x + noise * torch.randn_like(x))[order], labels[order]


def with_gradient(function, x, upstream):
    loss = function(x)
    return loss, torch.autograd.grad((loss * upstream).sum(), x)[0]


def test_golden(contextual_case, relative_error):
    case = contextual_case
    x = case["embeddings"].requires_grad_()
    loss = sparse_contextual_loss(x, case["labels"], int(case["k"]), float(case["eps"])).mean()
    assert relative_error(loss, case["contextual_loss"]) < 1e-4
    (grad,) = torch.autograd.grad(loss, x)
    assert relative_error(grad, case["contextual_grad"]) < 1e-4


@pytest.mark.parametrize("shape", [(8, 4, 6), (20, 3, 12), (1, 15, 5), (15, 1, 5), (1, 1, 3)])
@pytest.mark.parametrize(("k", "slack"), [(1, 0.0), (2, 0.05), (4, 0.05), (5, 0.3), (99, 4.0)])
def test_equals_autograd_through_dense_matrices(shape, k, slack, relative_error):
    x, labels = clustered(*shape)
    x.requires_grad_()
    upstream = torch.rand(len(x), dtype=x.dtype)
    loss, grad = with_gradient(lambda x: sparse_contextual_loss(x, labels, k, slack), x, upstream)
    expected, expected_grad = with_gradient(
        lambda x: contextual_loss(pairwise_cosine(x), labels, k, slack), x, upstream
    )
    assert torch.allclose(loss, expected, rtol=1e-12, atol=1e-14)
    assert torch.allclose(grad, expected_grad, rtol=1e-9, atol=1e-13)


def test_duplicates_and_zero_vectors():
    x, labels = clustered(6, 5, 4, dtype=torch.float32)
    x = torch.cat([x, x[:9], torch.zeros(2, 4)]).requires_grad_()
    labels = torch.cat([labels, labels[:9], torch.tensor([0, 1])])
    loss, grad = with_gradient(lambda x: sparse_contextual_loss(x, labels), x, torch.ones(41))
    assert ((loss >= 0) & (loss <= 1)).all()
    assert grad.isfinite().all()


def test_blocks_do_not_change_the_answer(monkeypatch):
    x, labels = clustered(10, 5, 6)
    expected = sparse_contextual_loss(x, labels)
    monkeypatch.setattr(sys.modules[sparse_context.__module__], "BLOCK", 120)
    assert torch.equal(sparse_contextual_loss(x, labels), expected)


def test_it_cannot_be_differentiated_twice():
    x, labels = clustered(4, 4, 5)
    loss = sparse_contextual_loss(x.requires_grad_(), labels).sum()
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(loss, x, create_graph=True)


def test_it_pays_where_neighbourhoods_and_classes_are_small():
    if not torch.backends.mkl.is_available():
        pytest.skip("torch is built without the sparse products of MKL")
    x, labels = clustered(150, 4, 32, dtype=torch.float32)
    assert sparse_pays(x, labels)
    assert not sparse_pays(x[:200], labels[:200])  # a small batch
    assert not sparse_pays(x, labels % 3)  # large classes
    assert not sparse_pays(x, labels, slack=1.5)  # large neighbourhoods
    assert not sparse_pays(torch.ones_like(x), labels)  # all equal


def test_nothing_comes_of_nothing():
    x, labels = torch.empty(0, 3, requires_grad=True), torch.empty(0).long()
    assert not sparse_pays(x, labels)
    for function in (
        lambda: sparse_contextual_loss(x, labels),
        lambda: contextual_loss(pairwise_cosine(x), labels),
    ):
        assert function().shape == (0,)


def test_backward_frees_what_forward_kept():
    x, labels = clustered(4, 4, 5)
    loss = sparse_contextual_loss(x.requires_grad_(), labels).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()
