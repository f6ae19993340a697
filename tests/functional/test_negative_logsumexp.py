from __future__ import annotations

import sys

import pytest
import torch
from torch.nn.functional import normalize

from pml_extras.functional import center_contrastive_loss
from pml_extras.functional.negative_logsumexp import negative_logsumexp

N, C, D = 12, 50, 5


MODULE = sys.modules[negative_logsumexp.__module__]


@pytest.fixture(autouse=True, params=["none kept", "some kept", "all kept", "plainly"])
def _chunks(request, monkeypatch):
    monkeypatch.setattr(MODULE, "CHUNK", 7 * N)
    kept = {"none kept": 0, "some kept": 3 * 7 * N, "all kept": N * C}
    monkeypatch.setattr(MODULE, "KEPT", kept.get(request.param, 0))
    monkeypatch.setattr(MODULE, "FEW", N * C if request.param == "plainly" else 0)


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
    total, own = negative_logsumexp(x, c, labels, 9.0, seen if partly_seen else None)
    for i in range(N):
        others = seen & (torch.arange(C) != labels[i])
        expected = (9.0 * normalize(c[others]) @ normalize(x[i], dim=0)).logsumexp(0)
        assert torch.allclose(total[i], expected)
    assert torch.allclose(own, torch.cosine_similarity(x, c[labels]))


def test_gradcheck(inputs):
    x, c, labels = inputs
    seen = some_seen(labels)
    assert torch.autograd.gradcheck(
        lambda x, c: negative_logsumexp(x, c, labels, 3.0, seen), (x, c)
    )


def test_gradients_of_either_alone(inputs):
    x, c, labels = inputs
    both = torch.autograd.grad(sum(f.sum() for f in negative_logsumexp(x, c, labels, 3.0)), (x, c))
    for i in range(2):
        alone = [t if j == i else t.detach() for j, t in enumerate((x, c))]
        loss = sum(f.sum() for f in negative_logsumexp(*alone, labels, 3.0))
        assert torch.allclose(*torch.autograd.grad(loss, alone[i]), both[i])


def test_backward_can_be_repeated(inputs):
    x, c, labels = inputs
    total, own = negative_logsumexp(x, c, labels, 3.0)
    first, second = (
        torch.autograd.grad((total * own).sum(), (x, c), retain_graph=True) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_second_derivatives(inputs):
    x, c, labels = inputs
    assert torch.autograd.gradgradcheck(
        lambda x, c: negative_logsumexp(x, c, labels[:3], 3.0),
        (x[:3].detach().requires_grad_(), c),
    )


def test_compiles_to_the_same_values(inputs):
    x, c, labels = inputs
    torch._dynamo.reset()
    compiled = torch.compile(negative_logsumexp, backend="aot_eager", fullgraph=True)
    results = []
    for function in (compiled, negative_logsumexp):
        total, own = function(x, c, labels, 3.0)
        results.append((total, own, *torch.autograd.grad((total * own).sum(), (x, c))))
    for actual, expected in zip(*results, strict=True):
        assert torch.allclose(actual, expected)


@pytest.mark.parametrize("scale", [1e-3, 64.0, 1e4])
def test_extreme_scales(inputs, scale):
    x, c, labels = inputs
    total, own = negative_logsumexp(x, c, labels, scale)
    cosines = torch.cosine_similarity(x[:, None], c, dim=2)
    others = cosines[torch.arange(C) != labels[:, None]].view(N, C - 1)
    assert torch.allclose(total, (scale * others).logsumexp(1))
    grads = torch.autograd.grad((total + own).sum(), (x, c))
    expected = ((scale * others).logsumexp(1) + cosines[torch.arange(N), labels]).sum()
    for actual, wanted in zip(grads, torch.autograd.grad(expected, (x, c)), strict=True):
        assert torch.allclose(actual, wanted, rtol=1e-8, atol=1e-8)


def test_one_class_alone():
    x, c = torch.randn(4, 3, requires_grad=True), torch.randn(1, 3, requires_grad=True)
    labels = torch.zeros(4, dtype=torch.long)
    loss = center_contrastive_loss(x, c, labels, center_weight=0)
    assert torch.equal(loss, torch.zeros(4))
    loss.sum().backward()
    assert torch.equal(x.grad, torch.zeros(4, 3))
    assert torch.equal(c.grad, torch.zeros(1, 3))


def test_no_gradient_is_made_for_centers_that_want_none(inputs):
    x, c, labels = inputs
    total, own = negative_logsumexp(x, c.detach(), labels, 3.0)
    (total.sum() + own.sum()).backward()
    assert x.grad.abs().sum() > 0
    assert c.grad is None


def test_two_halves_of_the_classes_make_the_whole(inputs):
    x, c, labels = inputs
    half, seen = C // 2, some_seen(labels)
    left, right = (
        negative_logsumexp(
            x,
            c[part],
            (labels - part.start).clamp(0, half - 1),
            9.0,
            seen[part],
            labels // half == i,
        )
        for i, part in enumerate((slice(0, half), slice(half, C)))
    )
    weights = torch.rand(2, N, dtype=torch.float64)
    results = []
    for total, own in (
        (torch.logaddexp(left[0], right[0]), left[1] + right[1]),
        negative_logsumexp(x, c, labels, 9.0, seen),
    ):
        grads = torch.autograd.grad((weights[0] * total + weights[1] * own).sum(), (x, c))
        results.append((total, own, *grads))
    for actual, expected in zip(*results, strict=True):
        assert torch.allclose(actual, expected)


@pytest.mark.parametrize("wanted", [0, 1])
def test_second_derivatives_of_either_alone(inputs, wanted):
    x, c, labels = inputs
    alone = [t if i == wanted else t.detach() for i, t in enumerate((x, c))]
    results = []
    for given in (alone, (x, c)):
        total, own = negative_logsumexp(*given, labels, 3.0)
        (first,) = torch.autograd.grad((total * own).sum(), given[wanted], create_graph=True)
        results.append(torch.autograd.grad(first.square().sum(), given[wanted])[0])
    assert torch.allclose(*results)


def test_a_bank_may_be_moved_before_backward(inputs, request):
    """As averaged centers are by the next batch, if two losses are summed."""
    x, c, labels = inputs
    c = c.detach()
    expected = torch.autograd.grad(sum(f.sum() for f in negative_logsumexp(x, c, labels, 3.0)), x)
    moved = c.clone()
    total, own = negative_logsumexp(x, moved, labels, 3.0)
    moved.neg_()
    (found,) = torch.autograd.grad((total + own).sum(), x, retain_graph=True)
    assert torch.equal(found, expected[0])
    if "plainly" not in request.node.name:
        with pytest.raises(RuntimeError, match="the centers have moved since forward"):
            torch.autograd.grad((total + own).sum(), x, create_graph=True)
