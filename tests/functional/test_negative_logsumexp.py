from __future__ import annotations

import sys

import pytest
import torch
from torch.nn.functional import normalize

from pml_extras.functional import center_contrastive_loss, negative_logsumexp

N, C, D = 12, 50, 5


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(sys.modules[negative_logsumexp.__module__], "CHUNK", 7 * N)


@pytest.fixture
def inputs():
    x = torch.randn(N, D, dtype=torch.float64, requires_grad=True)
    c = torch.randn(C, D, dtype=torch.float64, requires_grad=True)
    return x, c, torch.randint(C, (N,))


def some_seen(labels):
    seen = torch.rand(C) < 0.7
    seen[labels] = True
    return seen


@pytest.mark.parametrize("partly_seen", [False, True])
def test_equals_a_loop_over_samples(inputs, partly_seen):
    x, c, labels = inputs
    seen = some_seen(labels) if partly_seen else torch.ones(C, dtype=torch.bool)
    unit = normalize(x)
    total, own = negative_logsumexp(unit, c, labels, 9.0, seen if partly_seen else None)
    for i in range(N):
        others = seen & (torch.arange(C) != labels[i])
        expected = (9.0 * normalize(c[others]) @ unit[i]).logsumexp(0)
        assert torch.allclose(total[i], expected)
    assert torch.allclose(own, normalize(c)[labels])


def test_gradcheck(inputs):
    x, c, labels = inputs
    seen = some_seen(labels)
    assert torch.autograd.gradcheck(
        lambda x, c: negative_logsumexp(normalize(x), c, labels, 3.0, seen), (x, c)
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("partly_seen", [False, True])
def test_the_loss_is_the_same_with_many_classes(inputs, smoothing, partly_seen, monkeypatch):
    x, c, labels = inputs
    seen = some_seen(labels) if partly_seen else None
    upstream = torch.rand(N, dtype=torch.float64)
    results = []
    for few in (0, 1 << 20):
        monkeypatch.setattr(sys.modules[center_contrastive_loss.__module__], "FEW_LOGITS", few)
        loss = center_contrastive_loss(x, c, labels, 16, 0.2, 1.5, smoothing, seen)
        results.append((loss, *torch.autograd.grad((loss * upstream).sum(), (x, c))))
    for actual, expected in zip(*results, strict=True):
        assert torch.allclose(actual, expected, rtol=1e-10, atol=1e-12)


def test_one_class_alone(monkeypatch):
    monkeypatch.setattr(sys.modules[center_contrastive_loss.__module__], "FEW_LOGITS", 0)
    x, c = torch.randn(4, 3, requires_grad=True), torch.randn(1, 3, requires_grad=True)
    labels = torch.zeros(4, dtype=torch.long)
    loss = center_contrastive_loss(x, c, labels, center_weight=0)
    assert torch.equal(loss, torch.zeros(4))
    loss.sum().backward()
    assert torch.equal(x.grad, torch.zeros(4, 3))
    assert torch.equal(c.grad, torch.zeros(1, 3))


def test_no_gradient_is_made_for_centers_that_want_none(inputs):
    x, c, labels = inputs
    total, own = negative_logsumexp(normalize(x), c.detach(), labels, 3.0)
    (total.sum() + own.sum()).backward()
    assert x.grad.abs().sum() > 0
    assert c.grad is None


def test_it_cannot_be_differentiated_twice(inputs):
    x, c, labels = inputs
    total, _ = negative_logsumexp(normalize(x), c, labels, 3.0)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(total.sum(), x, create_graph=True)


def test_two_halves_of_the_classes_make_the_whole(inputs):
    x, c, labels = inputs
    unit, half = normalize(x), C // 2
    total, own = negative_logsumexp(unit, c, labels, 9.0)
    left = negative_logsumexp(unit, c[:half], labels.where(labels < half, -1), 9.0)
    right = negative_logsumexp(unit, c[half:], (labels - half).clamp_min(-1), 9.0)
    halves = torch.logaddexp(left[0], right[0]), left[1] + right[1]
    weights = torch.rand(N, D, dtype=torch.float64)
    gradients = []
    for found in (halves, (total, own)):
        loss = (found[0] * weights[:, 0]).sum() + (found[1] * weights).sum()
        gradients.append(torch.autograd.grad(loss, (x, c), retain_graph=True))
    for actual, expected in zip((*halves, *gradients[0]), (total, own, *gradients[1]), strict=True):
        assert torch.allclose(actual, expected)
