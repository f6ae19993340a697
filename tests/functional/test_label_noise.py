from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from pml_extras.functional import _label_noise, contextual_similarity, label_vote
from pml_extras.functional._kernels import sparse_contextual


def mixture(num_classes=30, per_class=10, noise=0.4):
    centers = normalize(torch.randn(num_classes, 16))
    true_labels = torch.arange(num_classes).repeat_interleave(per_class)
    x = centers[true_labels] + noise / 4 * torch.randn(len(true_labels), 16)
    noisy_labels = true_labels.clone()
    wrong = torch.randperm(len(true_labels))[: len(true_labels) // 5]
    noisy_labels[wrong] = (
        noisy_labels[wrong] + torch.randint(1, num_classes, (len(wrong),))
    ) % num_classes
    return x, 3 * true_labels + 5, 3 * noisy_labels + 5  # labels need not be 0 to C - 1


def loop_over_samples(x, labels, k):
    """Yields vote_lift, is_plurality and suggested_label of each sample, computed in float64."""
    x = normalize(x.double())
    context = contextual_similarity(-x @ x.T, num_neighbors=k, slack=0.0)
    for i in range(len(x)):
        others = torch.arange(len(x)) != i
        label = int(labels[i])
        votes = {c: context[i, others & (labels == c)].sum() for c in labels.unique().tolist()}
        sum_votes, max_votes = sum(votes.values()), max(votes.values())
        chance = max(int((labels == label).sum()) - 1, 1) / (len(x) - 1)
        vote_lift = votes[label] / sum_votes / chance if sum_votes > 0 else 1
        is_plurality = votes[label] == max_votes
        yield vote_lift, is_plurality, label if is_plurality else max(votes, key=votes.get)


def assert_equals_a_loop(x, labels, k):
    vote = label_vote(x.double(), labels, num_neighbors=k)
    for i, (vote_lift, is_plurality, suggested_label) in enumerate(loop_over_samples(x, labels, k)):
        assert vote.vote_lift[i].item() == pytest.approx(float(vote_lift))
        assert vote.is_plurality[i] == is_plurality
        assert vote.suggested_label[i] == suggested_label


@pytest.fixture(params=[True, False], ids=["sparse", "dense"])
def implementation(request, monkeypatch):
    monkeypatch.setattr(sparse_contextual, "MIN_SPARSITY", 0.1 if request.param else 1e9)
    monkeypatch.setattr(sparse_contextual, "CHUNK_NUMEL", 7 * 300)
    monkeypatch.setattr(_label_noise, "CLASSES_PER_CHUNK", 11)


@pytest.mark.parametrize("k", [1, 4, 12])
def test_equals_a_loop_over_samples(k, implementation):
    x, _, labels = mixture()
    assert_equals_a_loop(x, labels, k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_does_not_break_ties_between_classes(implementation, dtype):
    x = torch.randn(60, 16, dtype=dtype).repeat_interleave(5, 0)
    labels = (2 * torch.arange(60)[:, None] + torch.tensor([0, 0, 0, 1, 1])).flatten()
    vote = label_vote(x, labels, num_neighbors=5)
    # A sample with the even label has two votes for it and two against, one with the odd label has
    # one for it and three against.
    assert torch.equal(vote.is_plurality, labels % 2 == 0)
    assert torch.equal(vote.suggested_label, labels // 2 * 2)


@pytest.mark.parametrize("k", [2, 9])
def test_equals_a_loop_with_neighborhoods_of_unequal_size(implementation, k):
    x, _, labels = mixture()
    x[torch.randperm(300)[:40]] = x[7].clone()  # 40 equal embeddings
    x[11] = 0  # a zero vector: all samples are equally near to it
    assert_equals_a_loop(x, labels, k)


def test_finds_the_wrong_labels_and_suggests_the_true_ones():
    x, true_labels, noisy_labels = mixture()
    vote = label_vote(x, noisy_labels, num_neighbors=10)
    wrong = true_labels != noisy_labels
    assert ((vote.vote_lift < 1) == wrong).double().mean() > 0.98
    assert (vote.suggested_label == true_labels).double().mean() > 0.98


def test_random_labels_have_a_mean_vote_lift_of_one():
    x, _, _ = mixture(num_classes=60)
    vote_lift = torch.cat(
        [label_vote(x, torch.randint(6, (600,)), num_neighbors=10).vote_lift for _ in range(10)]
    )
    assert vote_lift.mean().item() == pytest.approx(1, abs=0.05)


def test_half_precision_is_computed_in_float32():
    x, _, labels = mixture()
    votes = [label_vote(x, labels, num_neighbors=10) for x in (x.bfloat16(), x.bfloat16().float())]
    for actual, expected in zip(*votes, strict=True):
        assert torch.equal(actual, expected)


def test_the_order_of_the_samples_does_not_matter():
    x, _, labels = mixture()
    x, order = x.double(), torch.randperm(len(x))
    vote = label_vote(x, labels, num_neighbors=10)
    shuffled = label_vote(x[order], labels[order], num_neighbors=10)
    for actual, expected in zip(shuffled, vote, strict=True):
        assert torch.allclose(actual.double(), expected[order].double())


@pytest.mark.parametrize("n", [0, 1, 2])
def test_accepts_fewer_than_three_samples(n):
    vote_lift, is_plurality, suggested_label = label_vote(torch.randn(n, 3), torch.arange(n))
    assert len(vote_lift) == len(is_plurality) == len(suggested_label) == n
    assert not vote_lift.isnan().any()
