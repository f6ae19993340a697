from __future__ import annotations

import sys

import pytest
import torch

from pml_extras.functional import contrastive_loss, pairwise_cosine, sparse_contrastive_loss


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(sys.modules["pml_extras.functional.sparse_context"], "BLOCK", 150)


@pytest.fixture
def batch():
    labels = torch.randint(12, (40,)) - 5
    return torch.randn(40, 3, dtype=torch.float64, requires_grad=True), labels


@pytest.mark.parametrize("margins", [(0.75, 0.6), (1.0, -1.0), (-1.0, 1.0), (0.2, 0.9)])
def test_equals_the_dense_term(batch, margins):
    x, labels = batch
    same = labels[:, None] == labels
    upstream = torch.rand(40, dtype=torch.float64)
    expected = contrastive_loss(
        pairwise_cosine(x), same & ~torch.eye(40, dtype=torch.bool), ~same, *margins
    )
    actual = sparse_contrastive_loss(x, labels, *margins)
    assert torch.allclose(actual, expected, rtol=1e-12, atol=1e-14)
    grads = [torch.autograd.grad((f * upstream).sum(), x)[0] for f in (actual, expected)]
    assert torch.allclose(*grads, rtol=1e-9, atol=1e-13)


def test_gradcheck(batch):
    x, labels = batch
    assert torch.autograd.gradcheck(lambda x: sparse_contrastive_loss(x, labels), x)


@pytest.mark.parametrize("labels", [torch.zeros(6).long(), torch.arange(6), torch.zeros(1).long()])
def test_without_pairs_of_one_kind(labels):
    x = torch.randn(len(labels), 3, requires_grad=True)
    loss = sparse_contrastive_loss(x, labels)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert x.grad.isfinite().all()


def test_it_cannot_be_differentiated_twice(batch):
    x, labels = batch
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(sparse_contrastive_loss(x, labels).sum(), x, create_graph=True)


def test_large_classes_take_no_more_memory_than_their_pairs(batch):
    x = torch.randn(60, 1000, dtype=torch.float64, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.numel()) or t, lambda t: t
    ):
        sparse_contrastive_loss(x, torch.zeros(60).long())
    assert max(saved) == x.numel()


def test_nothing_comes_of_nothing():
    x = torch.empty(0, 3, requires_grad=True)
    assert sparse_contrastive_loss(x, torch.empty(0).long()).shape == (0,)
