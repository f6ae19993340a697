from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from pml_extras.functional import _label_noise, contextual_similarity, label_vote
from pml_extras.functional._kernels import sparse_contextual


def mixture(num_classes=30, per_class=10, noise=0.4):
    centers = normalize(torch.randn(num_classes, 16))
    true = torch.arange(num_classes).repeat_interleave(per_class)
    x = centers[true] + noise / 4 * torch.randn(len(true), 16)
    noisy_labels = true.clone()
    wrong = torch.randperm(len(true))[: len(true) // 5]
    noisy_labels[wrong] = (
        noisy_labels[wrong] + torch.randint(1, num_classes, (len(wrong),))
    ) % num_classes
    return x, 3 * true + 5, 3 * noisy_labels + 5  # labels need not be 0 to C - 1


def loop_over_samples(x, labels, k):
    """Support, trust and suggested_label, one sample at a time, in float64."""
    x = normalize(x.double())
    context = contextual_similarity(-x @ x.T, num_neighbors=k, slack=0.0)
    for i in range(len(x)):
        others = torch.arange(len(x)) != i
        of_class = {c: context[i, others & (labels == c)].sum() for c in labels.unique().tolist()}
        total, own = sum(of_class.values()), of_class[int(labels[i])]
        chance = max(int((labels == labels[i]).sum()) - 1, 1) / (len(x) - 1)
        most = max(of_class.values())
        suggested_label = int(labels[i]) if own == most else max(of_class, key=of_class.get)
        yield (own / total / chance if total > 0 else 1), own == most, suggested_label


def assert_equals_a_loop(x, labels, k):
    found = label_vote(x.double(), labels, num_neighbors=k)
    for i, (vote_lift, is_plurality, suggested_label) in enumerate(loop_over_samples(x, labels, k)):
        assert found.vote_lift[i].item() == pytest.approx(float(vote_lift))
        assert found.is_plurality[i] == is_plurality
        assert found.suggested_label[i] == suggested_label


@pytest.fixture(params=[True, False], ids=["sparse", "dense"])
def implementation(request, monkeypatch):
    monkeypatch.setattr(sparse_contextual, "MIN_SPARSITY", 0.1 if request.param else 1e9)
    monkeypatch.setattr(sparse_contextual, "CHUNK_NUMEL", 7 * 300)
    monkeypatch.setattr(_label_noise, "MAX_CLASSES", 11)


@pytest.mark.parametrize("k", [1, 4, 12])
def test_equals_a_loop_over_samples(k, implementation):
    x, _, labels = mixture()
    assert_equals_a_loop(x, labels, k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_decides_nothing_between_classes_that_have_as_much(implementation, dtype):
    x = torch.randn(60, 16, dtype=dtype).repeat_interleave(5, 0)
    labels = (2 * torch.arange(60)[:, None] + torch.tensor([0, 0, 0, 1, 1])).flatten()
    found = label_vote(x, labels, num_neighbors=5)
    assert torch.equal(found.is_plurality, labels % 2 == 0)  # two votes to two; one vote to three
    assert torch.equal(found.suggested_label, labels // 2 * 2)


@pytest.mark.parametrize("k", [2, 9])
def test_neighborhoods_of_very_unequal_size(implementation, k):
    x, _, labels = mixture()
    x[torch.randperm(300)[:40]] = x[7].clone()  # which are all as near to each other
    x[11] = 0  # to which all are as near
    assert_equals_a_loop(x, labels, k)


def test_finds_the_wrong_labels_and_knows_the_right_ones():
    x, true, noisy_labels = mixture()
    found = label_vote(x, noisy_labels, num_neighbors=10)
    wrong = true != noisy_labels
    assert ((found.vote_lift < 1) == wrong).double().mean() > 0.98
    assert (found.suggested_label == true).double().mean() > 0.98


def test_vote_lift_is_one_on_average_where_labels_are_drawn_at_random():
    x, _, _ = mixture(num_classes=60)
    vote_lift = torch.cat(
        [label_vote(x, torch.randint(6, (600,)), num_neighbors=10).vote_lift for _ in range(10)]
    )
    assert vote_lift.mean().item() == pytest.approx(1, abs=0.05)


def test_half_precision_is_widened():
    x, _, labels = mixture()
    expected = label_vote(x.bfloat16().float(), labels, num_neighbors=10)
    for actual, wanted in zip(
        label_vote(x.bfloat16(), labels, num_neighbors=10), expected, strict=True
    ):
        assert torch.equal(actual, wanted)


def test_the_order_of_the_samples_does_not_matter():
    x, _, labels = mixture()
    x, order = x.double(), torch.randperm(len(x))
    expected = label_vote(x, labels, num_neighbors=10)
    for actual, wanted in zip(
        label_vote(x[order], labels[order], num_neighbors=10), expected, strict=True
    ):
        assert torch.allclose(actual.double(), wanted[order].double())


@pytest.mark.parametrize("n", [0, 1, 2])
def test_few_samples(n):
    vote_lift, is_plurality, suggested_label = label_vote(torch.randn(n, 3), torch.arange(n))
    assert len(vote_lift) == len(is_plurality) == len(suggested_label) == n
    assert not vote_lift.isnan().any()
