from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from pml_extras.functional import moving_class_means


def updated(means, counts, x, labels, **kwargs):
    means, counts = means.clone(), counts.clone()
    means[labels], counts[labels] = moving_class_means(means, counts, x, labels, **kwargs)
    return means, counts


def loop_over_classes(means, counts, x, labels, momentum, normalize_means):
    means, counts = means.double().clone(), counts.clone()
    rescale = (lambda v: v / v.norm()) if normalize_means else (lambda v: v)
    for c in labels.unique().tolist():
        rows = x[(labels == c) & x.isfinite().all(1)].double()
        if len(rows) == 0:
            continue
        mean = rescale(rows.mean(0))
        means[c] = rescale(momentum * means[c] + (1 - momentum) * mean) if counts[c] else mean
        counts[c] += len(rows)
    return means, counts


@pytest.fixture
def state():
    means = normalize(torch.randn(7, 5))
    return means, torch.tensor([0, 3, 0, 1, 9, 2, 4])


@pytest.mark.parametrize("normalize_means", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.5, 1.0])
def test_equals_a_loop_over_classes(state, momentum, normalize_means):
    x, labels = torch.randn(30, 5) * 20, torch.randint(5, (30,))
    means, counts = updated(*state, x, labels, momentum=momentum, normalize=normalize_means)
    expected_means, expected_counts = loop_over_classes(
        *state, x, labels, momentum, normalize_means
    )
    assert torch.allclose(means.double(), expected_means, atol=1e-6)
    assert torch.equal(counts, expected_counts)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_the_order_of_the_batch_does_not_change_the_result(state, scale):
    x, labels = torch.randn(200, 5) * torch.rand(200, 1) * scale, torch.randint(7, (200,))
    means, counts = updated(*state, x, labels, momentum=0.9)
    for _ in range(5):
        order = torch.randperm(200)
        shuffled_means, shuffled_counts = updated(*state, x[order], labels[order], momentum=0.9)
        assert torch.equal(shuffled_means, means)
        assert torch.equal(shuffled_counts, counts)


def test_rows_that_are_not_finite_are_ignored(state):
    x, labels = torch.randn(20, 5), torch.randint(4, (20,))
    broken = torch.cat([x, torch.full((1, 5), float("nan")), torch.full((1, 5), float("inf"))])
    broken_labels = torch.cat([labels, torch.tensor([0, 6])])
    expected = updated(*state, x, labels, momentum=0.9)
    actual = updated(*state, broken, broken_labels, momentum=0.9)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_classes_without_samples_do_not_change(state):
    means, counts = updated(*state, torch.randn(3, 5), torch.tensor([1, 1, 2]), momentum=0.9)
    others = [0, 3, 4, 5, 6]
    assert torch.equal(means[others], state[0][others])
    assert torch.equal(counts[others], state[1][others])


def test_a_large_row_does_not_round_other_classes_to_zero():
    x, labels = torch.tensor([[1e30, 0.0], [1.0, 1.0], [1.0, 2.0]]), torch.arange(3)
    means, counts = updated(torch.zeros(3, 2), torch.zeros(3).long(), x, labels, momentum=0.9)
    assert torch.equal(means, x)
    assert torch.equal(counts, torch.ones(3).long())
