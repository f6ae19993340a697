from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from pml_extras.functional import _label_noise, contextual_similarity, label_vote
from pml_extras.functional._kernels import sparse_contextual
from pml_extras.functional._label_noise import class_size_neighbors


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
    """Yields vote_lift, vote_margin and suggested_label of each sample, computed in float64."""
    x = normalize(x.double())
    context = contextual_similarity(-x @ x.T, num_neighbors=k, slack=0.0)
    for i in range(len(x)):
        others = torch.arange(len(x)) != i
        label = int(labels[i])
        votes = {c: context[i, others & (labels == c)].sum() for c in labels.unique().tolist()}
        sum_votes, class_size = sum(votes.values()), int((labels == label).sum())
        if sum_votes == 0 or class_size == 1:
            yield 1, 0, label
            continue
        vote_lift = votes[label] / sum_votes / ((class_size - 1) / (len(x) - 1))
        other_votes = max(v for c, v in votes.items() if c != label)
        margin = (votes[label] - other_votes) / sum_votes
        yield vote_lift, margin, label if margin >= 0 else max(votes, key=votes.get)


def assert_equals_a_loop(x, labels, k):
    vote = label_vote(x.double(), labels, num_neighbors=k)
    if k is None:
        k = class_size_neighbors(labels)
    for i, (vote_lift, margin, suggested_label) in enumerate(loop_over_samples(x, labels, k)):
        assert vote.vote_lift[i].item() == pytest.approx(float(vote_lift))
        assert vote.vote_margin[i].item() == pytest.approx(float(margin), abs=1e-5)
        assert vote.suggested_label[i] == suggested_label


@pytest.fixture(params=[True, False], ids=["sparse", "dense"])
def implementation(request, monkeypatch):
    monkeypatch.setattr(sparse_contextual, "MIN_SPARSITY", 0.1 if request.param else 1e9)
    monkeypatch.setattr(sparse_contextual, "CHUNK_NUMEL", 7 * 300)
    monkeypatch.setattr(_label_noise, "CLASSES_PER_CHUNK", 11)


@pytest.mark.parametrize("k", [1, 4, 12, None])
def test_equals_a_loop_over_samples(k, implementation):
    x, _, labels = mixture()
    assert_equals_a_loop(x, labels, k)


def test_equals_a_loop_with_classes_of_unequal_size(implementation):
    x, _, labels = mixture()
    labels[labels < 50] = 5  # one large class
    labels[:2] = torch.tensor([7, 9])  # classes of one sample
    assert len(class_size_neighbors(labels).unique()) > 2
    assert_equals_a_loop(x, labels, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_does_not_break_ties_between_classes(implementation, dtype):
    x = torch.randn(60, 16, dtype=dtype).repeat_interleave(5, 0)
    labels = (2 * torch.arange(60)[:, None] + torch.tensor([0, 0, 0, 1, 1])).flatten()
    vote = label_vote(x, labels, num_neighbors=5)
    # A sample with the even label has two votes for it and two against, one with the odd label has
    # one for it and three against.
    assert torch.equal(vote.vote_margin >= 0, labels % 2 == 0)
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
    vote = label_vote(torch.randn(n, 3), torch.arange(n))
    assert all(len(values) == n for values in vote)
    assert not vote.vote_lift.isnan().any()
    assert not vote.is_issue.any()


# ---- No label is flagged with confidence, or replaced, without evidence.


def clusters(sizes, noise=0.1, dim=16):
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    centers = normalize(torch.randn(len(sizes), dim))
    x = centers[labels] + noise * normalize(torch.randn(len(labels), dim))
    return x, labels


def separate(sizes, **kwargs):
    """Classes of these sizes whose samples have their nearest neighbors in their own class."""
    x, labels = clusters(sizes, **kwargs)
    similarity = (normalize(x) @ normalize(x).T).fill_diagonal_(-1)
    several = torch.tensor(sizes)[labels] > 1
    assert (labels[similarity.argmax(1)] == labels)[several].all()
    return x, labels


@pytest.mark.parametrize(
    "sizes",
    [[10] * 3, [5] * 20, [2] * 30, [200, 5], [300, 8, 8], [20] * 10 + [1] * 50, [1] * 20],
    ids=["3 x 10", "20 x 5", "30 x 2", "200 + 5", "300 + 8 + 8", "50 singletons", "singletons"],
)
def test_right_labels_of_separate_classes_are_neither_flagged_nor_replaced(sizes, implementation):
    x, labels = separate(sizes)
    vote = label_vote(x, labels)
    assert not vote.is_issue.any()
    assert torch.equal(vote.suggested_label, labels)


def test_overlapping_small_classes_keep_their_labels():
    x, labels = separate([5] * 20, noise=0.5)
    assert (label_vote(x, labels).suggested_label == labels).double().mean() > 0.99


def test_the_samples_of_a_dominating_class_are_not_flagged_if_it_wins_the_vote():
    x, labels = clusters([200, 5], noise=0.9)
    vote = label_vote(x, labels, num_neighbors=40)
    below_chance = vote.vote_lift < 1
    assert below_chance.sum() > 20
    assert not vote.is_issue.any()


def test_a_single_wrong_label_is_found_in_a_small_class():
    x, true_labels = separate([10] * 3)
    labels = true_labels.clone()
    labels[4] = 2
    vote = label_vote(x, labels)
    assert vote.is_issue.nonzero().flatten().tolist() == [4]
    assert torch.equal(vote.suggested_label, true_labels)


@pytest.mark.parametrize("sizes", [[10] * 3, [20] * 10, [5] * 20, [40] * 5], ids=str)
def test_wrong_labels_of_equal_embeddings_are_found(sizes):
    """The embeddings of a class are equal, and equally far from those of all other classes."""
    true_labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    labels = true_labels.clone()
    labels[:: sizes[0]] = (labels[:: sizes[0]] + 1) % len(sizes)  # one per class
    vote = label_vote(torch.nn.functional.one_hot(true_labels).double(), labels)
    assert torch.equal(vote.is_issue, labels != true_labels)
    assert torch.equal(vote.suggested_label, true_labels)


def test_numbers_of_neighbors_come_from_the_class_sizes():
    labels = torch.tensor([7] * 100 + [3] * 30 + [5] * 4 + [9])
    k = class_size_neighbors(labels)
    assert k[labels == 7].unique().tolist() == [40]
    assert k[labels == 3].unique().tolist() == [27]  # less than half of the median, 100
    assert k[labels == 5].unique().tolist() == [3]
    assert k[labels == 9].unique().tolist() == [2]
    noisy_sizes = torch.arange(20).repeat_interleave(torch.tensor([4, 5, 6, 7, 8] * 4))
    assert class_size_neighbors(noisy_sizes).unique().tolist() == [5]
