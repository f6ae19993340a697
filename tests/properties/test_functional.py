"""Properties of the functions that the tests of no single component cover."""

from __future__ import annotations

import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from helpers.formulas import normalized, norms_fit_float32
from helpers.strategies import any_labels, class_labels, embeddings, seeds, shapes, small_shapes
from pml_extras.functional import (
    class_interference,
    moving_class_means,
    pairwise_cosine,
    weighted_label_vote,
)
from pml_extras.functional._kernels.self_matches import self_match_mask
from pml_extras.functional._neighborhoods import knn_radii


def draw_means(data, num_classes, d):
    generator = torch.Generator().manual_seed(data.draw(seeds))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    means = torch.randn(num_classes, d, generator=generator, dtype=dtype)
    return means, torch.randint(2, (num_classes,), generator=generator)


@given(data=st.data(), num_classes=st.integers(1, 12), normalize=st.booleans())
def test_moving_class_means_do_not_depend_on_the_sample_order(data, num_classes, normalize):
    n, d = data.draw(shapes)
    n = max(n, 1)
    x = data.draw(embeddings(n, d, non_finite=True))
    y = data.draw(class_labels(n, num_classes)).long()
    means, counts = draw_means(data, num_classes, d)
    new = moving_class_means(means, counts, x, y, momentum=0.7, normalize=normalize)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(data.draw(seeds)))
    permuted = moving_class_means(
        means, counts, x[order], y[order], momentum=0.7, normalize=normalize
    )
    for a, b in zip(new, permuted, strict=True):
        assert torch.equal(a[order], b)
    for c in range(num_classes):
        assert len(torch.unique(new[0][y == c], dim=0)) <= 1


@given(data=st.data(), num_classes=st.integers(1, 12))
def test_moving_class_means_match_the_formula(data, num_classes):
    n, d = data.draw(shapes)
    n = max(n, 1)
    x = data.draw(embeddings(n, d, non_finite=True))
    y = data.draw(class_labels(n, num_classes)).long()
    means, counts = draw_means(data, num_classes, d)
    new, new_counts = moving_class_means(means, counts, x, y, momentum=0.7)
    assert new.dtype == means.dtype
    finite = x.isfinite().all(1)
    limit = torch.finfo(means.dtype).max
    for i in range(n):
        class_rows = x[finite & (y == y[i])].double()
        assert new_counts[i] == counts[y[i]] + len(class_rows)
        expected = means[y[i]].double()
        if len(class_rows):
            mean = class_rows.mean(0)
            expected = 0.7 * expected + 0.3 * mean if counts[y[i]] else mean
        if expected.abs().max() < limit / 2:
            size = float(torch.cat([class_rows.flatten(), means[y[i]].double()]).abs().max())
            assert ((new[i] - expected).abs() <= 1e-6 * size + 1e-44).all()


@given(data=st.data())
def test_self_matches_are_rows_with_equal_bits(data):
    n, d = data.draw(shapes)
    x = data.draw(embeddings(n, d, non_finite=True))
    ref = data.draw(embeddings(data.draw(st.integers(0, 20)), d, dtype=x.dtype, non_finite=True))
    if data.draw(st.booleans()):
        signs = data.draw(st.sampled_from([1.0, 2.0, 0.5]))
        x, ref = (torch.where(rows > 0, signs, -signs).to(x.dtype) for rows in (x, ref))
    ref = torch.cat([ref, x.flip(0)])
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    bits, ref_bits = x.view(integer), ref.view(integer)
    expected = (bits[:, None] == ref_bits).all(2)
    nan = x.isnan().any(1)[:, None] | ref.isnan().any(1)
    # Converting a NaN to a wider type may change its bits.
    assert torch.equal(self_match_mask(x, ref) | nan, expected | nan)


@given(data=st.data())
def test_pairwise_cosine_matches_the_formula(data):
    n, d = data.draw(shapes)
    x = data.draw(embeddings(n, d))
    ref = data.draw(embeddings(data.draw(st.integers(0, 20)), d, dtype=x.dtype))
    cosines = pairwise_cosine(x, ref)
    assert cosines.shape == (n, len(ref))
    assert cosines.isfinite().all()
    assert (cosines.abs() <= 1 + 1e-6).all()
    if norms_fit_float32(x, ref):
        assert torch.allclose(cosines.double(), normalized(x) @ normalized(ref).T, atol=2e-6)


@given(data=st.data(), k=st.integers(1, 50), slack=st.sampled_from([0.0, 0.1, 1.0]))
def test_neighborhoods_have_at_least_k_members(data, k, slack):
    n, d = data.draw(small_shapes)
    table = data.draw(embeddings(n, d, dtype=torch.float64, extreme=False))
    mask = table <= knn_radii(table, k, slack)[0]
    assert (mask.sum(1) >= min(k, d)).all()
    farthest_in = table.masked_fill(~mask, -float("inf")).amax(1)
    nearest_out = table.masked_fill(mask, float("inf")).amin(1)
    assert (farthest_in < nearest_out).all()


@given(data=st.data())
def test_label_votes_match_a_count(data):
    n, r = data.draw(small_shapes)
    generator = torch.Generator().manual_seed(data.draw(seeds))
    similarity = torch.rand(n, r, generator=generator, dtype=torch.float64).mul(4).floor() / 4
    y = data.draw(any_labels(n))
    ref_y = y[torch.randint(n, (r,), generator=generator)]
    excluded = torch.rand(n, r, generator=generator) < 0.2
    vote = weighted_label_vote(similarity.masked_fill(excluded, 0), y, ref_y)
    for i in range(n):
        votes = {}
        for j in range(r):
            if not excluded[i, j]:
                label = int(ref_y[j])
                votes[label] = votes.get(label, 0) + float(similarity[i, j])
        total, target = sum(votes.values()), votes.pop(int(y[i]), 0)
        assert abs(float(vote.vote_fraction[i]) - (target / total if total else 0.5)) < 1e-12
        assert bool(vote.is_plurality[i]) == (target >= max(votes.values(), default=0))


@given(data=st.data(), num_classes=st.integers(1, 12), strength=st.floats(0, 0.49))
def test_interference_moves_by_at_most_its_strength(data, num_classes, strength):
    n, d = data.draw(shapes)
    x = data.draw(embeddings(n, d, extreme=False, non_finite=True))
    y = data.draw(class_labels(n, num_classes)).long()
    means, counts = draw_means(data, num_classes, d)
    seed = data.draw(seeds)
    probability = data.draw(st.sampled_from([0.0, 0.5, 1.0]))
    random_strength = data.draw(st.booleans())
    perturbed, repeated = (
        class_interference(
            x,
            y,
            means,
            counts,
            strength=strength,
            probability=probability,
            normalize=False,
            random_strength=random_strength,
            generator=torch.Generator().manual_seed(seed),
        )
        for _ in range(2)
    )
    finite = x.isfinite().all(1)
    assert torch.equal(perturbed[finite], repeated[finite])
    assert perturbed[finite].isfinite().all()
    for i in finite.nonzero().flatten().tolist():
        targets = means[(counts > 0) & (torch.arange(num_classes) != y[i])].double()
        shift = (perturbed[i].double() - x[i].double()).norm()
        if len(targets) == 0 or probability == 0:
            assert shift == 0
        else:
            farthest = (targets - x[i].double()).norm(dim=1)
            rounding = 1e-6 * (float(x[i].double().norm()) + float(targets.norm()))
            assert shift <= strength * farthest.max() + rounding
            if probability == 1 and not random_strength:
                assert (strength * farthest - shift).abs().min() <= rounding


@given(data=st.data())
def test_random_draws_of_interference_do_not_depend_on_the_embeddings(data):
    """Otherwise the generators of ranks and of resumed runs would diverge."""
    n, d = data.draw(shapes)
    y = data.draw(class_labels(n, 4)).long()
    means, counts = draw_means(data, 4, d)
    states = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(3)
        x = data.draw(embeddings(n, d, non_finite=True))
        class_interference(x, y, means, counts, generator=generator)
        states.append(generator.get_state())
    assume(n)
    assert torch.equal(*states)
