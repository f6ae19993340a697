from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from pml_extras.functional import contextual_loss
from pml_extras.functional._kernels import chunked_contrastive
from pml_extras.functional._kernels.chunked_contrastive import chunked_contrastive_term


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(chunked_contrastive, "CHUNK_NUMEL", 150)


@pytest.fixture
def batch():
    labels = torch.randint(12, (40,)) - 5
    return torch.randn(40, 3, dtype=torch.float64, requires_grad=True), labels


def chunked_term(x, labels, pos_margin=0.75, neg_margin=0.6):
    return chunked_contrastive_term(normalize(x), labels, pos_margin, neg_margin)


@pytest.mark.parametrize("margins", [(0.75, 0.6), (1.0, -1.0), (-1.0, 1.0), (0.2, 0.9)])
def test_equals_the_dense_term(batch, margins):
    x, labels = batch
    grad_output = torch.rand(40, dtype=torch.float64)
    expected = contextual_loss(
        x, labels, pos_margin=margins[0], neg_margin=margins[1], implementation="reference"
    ).contrastive
    actual = chunked_term(x, labels, *margins)
    assert torch.allclose(actual, expected, rtol=1e-12, atol=1e-14)
    grads = [torch.autograd.grad((f * grad_output).sum(), x)[0] for f in (actual, expected)]
    assert torch.allclose(*grads, rtol=1e-9, atol=1e-13)


def test_gradcheck(batch):
    x, labels = batch
    assert torch.autograd.gradcheck(lambda x: chunked_term(x, labels), x)


@pytest.mark.parametrize("labels", [torch.zeros(6).long(), torch.arange(6), torch.zeros(1).long()])
def test_is_finite_without_positive_or_negative_pairs(labels):
    x = torch.randn(len(labels), 3, requires_grad=True)
    loss = chunked_term(x, labels)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert x.grad.isfinite().all()


def test_cannot_be_differentiated_twice(batch):
    x, labels = batch
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(chunked_term(x, labels).sum(), x, create_graph=True)


def test_no_matrix_of_pairs_is_saved():
    x = normalize(torch.randn(60, 1000, dtype=torch.float64)).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.numel()) or t, lambda t: t
    ):
        chunked_contrastive_term(x, torch.zeros(60).long(), 0.75, 0.6)
    assert max(saved) == x.numel()
