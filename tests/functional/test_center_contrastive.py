from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from pml_extras.functional import center_contrastive_loss


def margined_logits(x, c, labels, scale, margin):
    cosines = normalize(x) @ normalize(c).T
    is_target = torch.nn.functional.one_hot(labels, len(c)).to(x.dtype)
    return scale * (cosines - margin * is_target)


def plain_loss(x, c, labels, scale, margin, center_weight, label_smoothing=0.0):
    """The formula in plain torch operations, for float64."""
    contrast = cross_entropy(
        margined_logits(x, c, labels, scale, margin),
        labels,
        reduction="none",
        label_smoothing=label_smoothing,
    )
    center = (normalize(x) - normalize(c)[labels]).square().sum(1)
    return contrast + center_weight * center


@pytest.fixture
def batch():
    x = torch.randn(20, 6, dtype=torch.float64)
    return x, torch.randn(9, 6, dtype=torch.float64), torch.randint(9, (20,))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("scale", "margin", "weight"), [(16, 0.2, 1.5), (64, 0.35, 0), (1, 0, 3)])
def test_equals_the_plain_formula_with_gradients(batch, scale, margin, weight, smoothing):
    x, c, labels = (t.requires_grad_(t.is_floating_point()) for t in batch)
    losses = [
        f(
            x,
            c,
            labels,
            scale=scale,
            margin=margin,
            center_weight=weight,
            label_smoothing=smoothing,
        )
        for f in (center_contrastive_loss, plain_loss)
    ]
    assert torch.allclose(*losses, rtol=1e-10, atol=1e-12)
    weights = torch.rand(len(x), dtype=x.dtype)
    for actual, expected in zip(
        *(torch.autograd.grad((loss * weights).sum(), (x, c)) for loss in losses), strict=True
    ):
        assert torch.allclose(actual, expected, rtol=1e-9, atol=1e-11)


def test_gradcheck(batch):
    x, c, labels = batch
    x, c, labels = x[:5].requires_grad_(), c.requires_grad_(), labels[:5]
    assert torch.autograd.gradcheck(
        lambda x, c: center_contrastive_loss(x, c, labels, scale=4.0, label_smoothing=0.1), (x, c)
    )


def test_gradients_equal_the_published_ones(batch):
    # The paper states dL/dcos_y = -s (1 - p_y) - 2 lambda and dL/dcos_j = s p_j. With orthonormal
    # centers, the cosines are the coordinates of a normalized embedding. Its gradient is the
    # projection of these derivatives on the tangent plane of the sphere.
    labels, s, m, weight = torch.tensor([2]), 16.0, 0.2, 1.5
    x = normalize(torch.randn(1, 5, dtype=torch.float64)).requires_grad_()
    center_contrastive_loss(
        x, torch.eye(5, dtype=torch.float64), labels, scale=s, margin=m, center_weight=weight
    ).backward()
    p = margined_logits(x.detach(), torch.eye(5, dtype=torch.float64), labels, s, m).softmax(1)
    grad_cosine = s * p
    grad_cosine[0, 2] = -s * (1 - p[0, 2]) - 2 * weight
    tangent = grad_cosine - (grad_cosine * x).sum() * x.detach()
    assert torch.allclose(x.grad, tangent, atol=1e-12)


def test_rescaling_the_inputs_does_not_change_the_loss(batch):
    x, c, labels = batch
    loss = center_contrastive_loss(x, c, labels)
    row_scales = torch.rand(len(x), 1, dtype=x.dtype) * 100 + 0.01
    assert torch.allclose(center_contrastive_loss(x * row_scales, c * 1e-3, labels), loss)


def test_float32_is_accurate_on_easy_samples():
    scale, margin = 64.0, 0.35
    c = normalize(torch.randn(20, 256, dtype=torch.float64))
    labels = torch.randint(20, (200,))
    x = c[labels] + 0.01 * torch.randn(200, 256, dtype=torch.float64)
    exact = center_contrastive_loss(x, c, labels, scale=scale, margin=margin, center_weight=0)
    assert exact.max() < 1e-6  # the samples are easy

    def worst_error(losses):
        return float(((losses.double() - exact) / exact).abs().max())

    actual = center_contrastive_loss(
        x.float(), c.float(), labels, scale=scale, margin=margin, center_weight=0
    )
    naive = cross_entropy(
        margined_logits(x.float(), c.float(), labels, scale, margin), labels, reduction="none"
    )
    assert worst_error(actual) < 1e-4
    assert worst_error(naive) > 0.5


def test_masked_classes_take_no_part(batch):
    x, c, labels = batch
    class_mask = torch.ones(9, dtype=torch.bool)
    class_mask[labels.unique()[0]] = False
    selected = class_mask[labels]
    remapped_labels = (class_mask.cumsum(0) - 1)[labels[selected]]
    for smoothing in (0.0, 0.2):
        actual = center_contrastive_loss(
            x[selected], c, labels[selected], label_smoothing=smoothing, class_mask=class_mask
        )
        expected = center_contrastive_loss(
            x[selected], c[class_mask], remapped_labels, label_smoothing=smoothing
        )
        assert torch.allclose(actual, expected)


def test_the_contrast_with_a_single_class_is_zero():
    x, c = torch.randn(4, 3, requires_grad=True), torch.randn(1, 3, requires_grad=True)
    labels = torch.zeros(4, dtype=torch.long)
    assert torch.equal(center_contrastive_loss(x, c, labels, center_weight=0), torch.zeros(4))
    center_contrastive_loss(x, c, labels).sum().backward()
    assert x.grad.isfinite().all()
    assert c.grad.isfinite().all()


def test_half_precision_is_computed_in_float32(batch):
    x, c, labels = batch
    for dtype in (torch.bfloat16, torch.float16):
        expected = center_contrastive_loss(x.to(dtype).float(), c.float(), labels)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(center_contrastive_loss(x.to(dtype), c.float(), labels), expected)
