from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from pml_extras.functional import _center_contrastive, center_contrastive_loss
from pml_extras.functional._center_contrastive import logsumexp_of_negatives
from pml_extras.functional._kernels import logsumexp_of_negatives as kernel

N, C, D = 12, 50, 5


@pytest.fixture(autouse=True, params=["none saved", "some saved", "all saved", "reference"])
def implementation(request, monkeypatch):
    monkeypatch.setattr(kernel, "CHUNK_NUMEL", 7 * N)
    saved = {"none saved": 0, "some saved": 3 * 7 * (N + D), "all saved": C * (N + D)}
    monkeypatch.setattr(kernel, "MAX_SAVED_NUMEL", saved.get(request.param, 0))
    reference_max = N * C if request.param == "reference" else 0
    monkeypatch.setattr(_center_contrastive, "MAX_REFERENCE_LOGITS", reference_max)
    return "reference" if request.param == "reference" else "chunked"


@pytest.fixture
def inputs():
    x = torch.randn(N, D, dtype=torch.float64, requires_grad=True)
    c = torch.randn(C, D, dtype=torch.float64, requires_grad=True)
    return x, c, torch.randint(C, (N,))


def random_class_mask(labels):
    class_mask = torch.rand(C) < 0.7
    class_mask[labels] = True
    return class_mask


@pytest.mark.parametrize("masked", [False, True])
def test_equals_a_loop_over_samples(inputs, masked):
    x, c, labels = inputs
    class_mask = random_class_mask(labels) if masked else torch.ones(C, dtype=torch.bool)
    lse, target = logsumexp_of_negatives(x, c, labels, 9.0, class_mask if masked else None)
    for i in range(N):
        others = class_mask & (torch.arange(C) != labels[i])
        expected = (9.0 * normalize(c[others]) @ normalize(x[i], dim=0)).logsumexp(0)
        assert torch.allclose(lse[i], expected)
    assert torch.allclose(target, torch.cosine_similarity(x, c[labels]))


def test_gradcheck(inputs):
    x, c, labels = inputs
    class_mask = random_class_mask(labels)
    assert torch.autograd.gradcheck(
        lambda x, c: logsumexp_of_negatives(x, c, labels, 3.0, class_mask), (x, c)
    )


def test_either_input_may_need_no_gradient(inputs):
    x, c, labels = inputs
    expected = torch.autograd.grad(
        sum(f.sum() for f in logsumexp_of_negatives(x, c, labels, 3.0)), (x, c)
    )
    for i in range(2):
        args = [t if j == i else t.detach() for j, t in enumerate((x, c))]
        loss = sum(f.sum() for f in logsumexp_of_negatives(*args, labels, 3.0))
        assert torch.allclose(*torch.autograd.grad(loss, args[i]), expected[i])


def test_backward_can_be_repeated(inputs):
    x, c, labels = inputs
    lse, target = logsumexp_of_negatives(x, c, labels, 3.0)
    first, second = (
        torch.autograd.grad((lse * target).sum(), (x, c), retain_graph=True) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_second_derivatives_need_the_reference_implementation(inputs, implementation):
    x, c, labels = inputs
    x = x[:3].detach().requires_grad_()
    if implementation == "chunked":
        lse, _ = logsumexp_of_negatives(x, c, labels[:3], 3.0)
        with pytest.raises(RuntimeError, match='use implementation="reference"'):
            torch.autograd.grad(lse.sum(), x, create_graph=True)
    assert torch.autograd.gradgradcheck(
        lambda x, c: logsumexp_of_negatives(x, c, labels[:3], 3.0, implementation="reference"),
        (x, c),
    )


def test_compiles_to_the_same_values(inputs):
    x, c, labels = inputs
    torch._dynamo.reset()
    compiled = torch.compile(logsumexp_of_negatives, backend="aot_eager", fullgraph=True)
    results = []
    for function in (compiled, logsumexp_of_negatives):
        lse, target = function(x, c, labels, 3.0)
        results.append((lse, target, *torch.autograd.grad((lse * target).sum(), (x, c))))
    for actual, expected in zip(*results, strict=True):
        assert torch.allclose(actual, expected)


@pytest.mark.parametrize("scale", [1e-3, 64.0, 1e4])
def test_equals_the_formula_at_extreme_scales(inputs, scale):
    x, c, labels = inputs
    lse, target = logsumexp_of_negatives(x, c, labels, scale)
    cosines = torch.cosine_similarity(x[:, None], c, dim=2)
    others = cosines[torch.arange(C) != labels[:, None]].view(N, C - 1)
    assert torch.allclose(lse, (scale * others).logsumexp(1))
    grads = torch.autograd.grad((lse + target).sum(), (x, c))
    expected = ((scale * others).logsumexp(1) + cosines[torch.arange(N), labels]).sum()
    for actual, expected_grad in zip(grads, torch.autograd.grad(expected, (x, c)), strict=True):
        assert torch.allclose(actual, expected_grad, rtol=1e-8, atol=1e-8)


def test_a_single_class_gives_zero_loss_and_gradients():
    x, c = torch.randn(4, 3, requires_grad=True), torch.randn(1, 3, requires_grad=True)
    labels = torch.zeros(4, dtype=torch.long)
    loss = center_contrastive_loss(x, c, labels, center_weight=0)
    assert torch.equal(loss, torch.zeros(4))
    loss.sum().backward()
    assert torch.equal(x.grad, torch.zeros(4, 3))
    assert torch.equal(c.grad, torch.zeros(1, 3))


def test_centers_may_need_no_gradient(inputs):
    x, c, labels = inputs
    lse, target = logsumexp_of_negatives(x, c.detach(), labels, 3.0)
    (lse.sum() + target.sum()).backward()
    assert x.grad.abs().sum() > 0
    assert c.grad is None


def test_results_of_two_halves_of_the_classes_combine(inputs):
    x, c, labels = inputs
    half, class_mask = C // 2, random_class_mask(labels)
    left, right = (
        logsumexp_of_negatives(
            x,
            c[part],
            (labels - part.start).clamp(0, half - 1),
            9.0,
            class_mask[part],
            labels // half == i,
        )
        for i, part in enumerate((slice(0, half), slice(half, C)))
    )
    weights = torch.rand(2, N, dtype=torch.float64)
    results = []
    for lse, target in (
        (torch.logaddexp(left[0], right[0]), left[1] + right[1]),
        logsumexp_of_negatives(x, c, labels, 9.0, class_mask),
    ):
        grads = torch.autograd.grad((weights[0] * lse + weights[1] * target).sum(), (x, c))
        results.append((lse, target, *grads))
    for actual, expected in zip(*results, strict=True):
        assert torch.allclose(actual, expected)


def test_centers_may_change_before_backward(inputs):
    """The next batch changes EMA centers, and two losses may be summed before one backward."""
    x, c, labels = inputs
    c = c.detach()
    expected = torch.autograd.grad(
        sum(f.sum() for f in logsumexp_of_negatives(x, c, labels, 3.0)), x
    )
    ema_centers = c.clone()
    lse, target = logsumexp_of_negatives(x, ema_centers, labels, 3.0)
    ema_centers.neg_()
    (actual,) = torch.autograd.grad((lse + target).sum(), x)
    assert torch.equal(actual, expected[0])
