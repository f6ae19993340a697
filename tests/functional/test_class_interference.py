from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from pml_extras.functional import class_interference

NUM_DRAWS = 200_000


@pytest.fixture
def means():
    return torch.randn(6, 4, dtype=torch.float64)


def count_draws(labels, counts, **kwargs):
    """How many embeddings stay, and how many are perturbed with each class.

    At strength 1 an embedding becomes the class mean, which is the class index here.
    """
    x = torch.full((len(labels), 1), -1.0, dtype=torch.float64)
    class_means = torch.arange(len(counts), dtype=torch.float64)[:, None]
    perturbed = class_interference(
        x, labels, class_means, counts, strength=1.0, normalize=False, **kwargs
    )
    return torch.bincount((perturbed.squeeze(1) + 1).round().long(), minlength=len(counts) + 1)


def test_draws_are_uniform_over_the_other_classes_with_a_mean():
    counts = torch.tensor([5, 0, 1, 2, 0, 9])  # classes 0, 2, 3 and 5 have a mean
    for label, candidates in {0: [2, 3, 5], 3: [0, 2, 5], 5: [0, 2, 3], 1: [0, 2, 3, 5]}.items():
        num_unmoved, *hits = count_draws(torch.full((NUM_DRAWS,), label), counts).tolist()
        assert num_unmoved == 0
        expected = NUM_DRAWS / len(candidates)
        for c, n in enumerate(hits):
            if c in candidates:
                assert abs(n - expected) < 5 * expected**0.5
            else:
                assert n == 0


def test_probability_is_the_fraction_of_perturbed_embeddings():
    counts = torch.ones(6, dtype=torch.long)
    for probability in (0.0, 0.3, 1.0):
        num_unmoved = int(
            count_draws(torch.zeros(NUM_DRAWS).long(), counts, probability=probability)[0]
        )
        deviation = (NUM_DRAWS * probability * (1 - probability)) ** 0.5
        assert abs((NUM_DRAWS - num_unmoved) - NUM_DRAWS * probability) <= 5 * deviation


@pytest.mark.parametrize("counts", [[0] * 6, [0, 0, 7, 0, 0, 0]])
def test_embeddings_stay_if_no_other_class_has_a_mean(means, counts):
    x, labels = torch.randn(10, 4, dtype=torch.float64), torch.full((10,), 2)
    perturbed = class_interference(
        x, labels, means, torch.tensor(counts), strength=0.4, normalize=False
    )
    assert torch.equal(perturbed, x)


def test_strength_zero_is_the_identity_without_normalization(means):
    x, labels = torch.randn(10, 4, dtype=torch.float64), torch.arange(10) % 6
    counts = torch.ones(6, dtype=torch.long)
    assert torch.equal(
        class_interference(x, labels, means, counts, strength=0.0, normalize=False), x
    )


def test_difference_of_class_means_shrinks_as_stated(means):
    # E[a' - p'] between classes a and p scales by 1 - strength K / (K - 1).
    strength, k = 0.2, 6
    counts = torch.ones(6, dtype=torch.long)
    labels = torch.arange(6).repeat_interleave(NUM_DRAWS // 6)
    perturbed = class_interference(
        means[labels], labels, means, counts, strength=strength, normalize=False
    )
    perturbed_means = torch.stack([perturbed[labels == c].mean(0) for c in range(6)])
    expected = (1 - strength * k / (k - 1)) * (means[0] - means[1])
    assert torch.allclose(perturbed_means[0] - perturbed_means[1], expected, atol=0.02)


def test_distance_within_a_class_grows_as_stated(means):
    # E|a' - p'|^2 = (1 - strength)^2 |a - p|^2 + 2 strength^2 V, with V the variance of the
    # other class means.
    strength = 0.3
    counts = torch.ones(6, dtype=torch.long)
    labels = torch.full((NUM_DRAWS,), 2)
    a, p = torch.randn(2, 4, dtype=torch.float64)
    perturbed_a, perturbed_p = (
        class_interference(
            v.expand(NUM_DRAWS, 4), labels, means, counts, strength=strength, normalize=False
        )
        for v in (a, p)
    )
    other_means = means[[0, 1, 3, 4, 5]]
    variance = (other_means - other_means.mean(0)).square().sum(1).mean()
    expected = (1 - strength) ** 2 * (a - p).square().sum() + 2 * strength**2 * variance
    actual = (perturbed_a - perturbed_p).square().sum(1).mean()
    assert float(actual) == pytest.approx(float(expected), rel=0.02)


def test_draws_are_independent_for_each_embedding(means):
    # One draw for a whole triplet would cancel in the differences of its embeddings.
    counts = torch.ones(6, dtype=torch.long)
    x = torch.zeros(1000, 4, dtype=torch.float64)
    perturbed = class_interference(
        x, torch.zeros(1000).long(), means, counts, strength=0.3, normalize=False
    )
    assert len(perturbed.unique(dim=0)) == 5


def test_random_strength_is_uniform_up_to_the_strength():
    counts = torch.ones(2, dtype=torch.long)
    class_means = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    perturbed = class_interference(
        torch.zeros(NUM_DRAWS, 1, dtype=torch.float64),
        torch.zeros(NUM_DRAWS).long(),
        class_means,
        counts,
        strength=0.4,
        normalize=False,
        random_strength=True,
    ).squeeze(1)
    quantiles = perturbed.quantile(torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64))
    expected = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    assert torch.allclose(quantiles, expected, atol=2e-3)


def test_embeddings_are_normalized_before_and_after(means):
    counts = torch.tensor([0, 1, 0, 0, 0, 0])  # the only negative of class 0 is class 1
    x, labels = torch.randn(10, 4, dtype=torch.float64), torch.zeros(10).long()
    perturbed = class_interference(x, labels, means, counts, strength=0.25)
    normalized = normalize(x)
    assert torch.allclose(perturbed, normalize(normalized + 0.25 * (means[1] - normalized)))


def test_the_target_class_stays_nearest_below_strength_one_half():
    means = torch.eye(2, dtype=torch.float64)
    counts = torch.ones(2, dtype=torch.long)
    for strength in (0.1, 0.49):
        perturbed = class_interference(
            means[:1], torch.tensor([0]), means, counts, strength=strength, normalize=False
        )
        assert (perturbed - means[0]).norm() < (perturbed - means[1]).norm()


def test_gradient_is_scaled_and_does_not_reach_the_means(means):
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    means.requires_grad_()
    counts = torch.ones(6, dtype=torch.long)
    class_interference(
        x, torch.arange(5), means, counts, strength=0.25, normalize=False
    ).sum().backward()
    assert torch.allclose(x.grad, torch.full_like(x, 0.75))
    assert means.grad is None


def test_a_generator_makes_the_draws_reproducible(means):
    counts = torch.ones(6, dtype=torch.long)
    x, labels = torch.randn(50, 4), torch.arange(50) % 6

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return class_interference(
            x, labels, means, counts, strength=0.3, probability=0.5, generator=generator
        )

    before = torch.get_rng_state()
    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert torch.equal(torch.get_rng_state(), before)  # the global generator is not used
