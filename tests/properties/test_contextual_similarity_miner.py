"""Properties of ContextualSimilarityMiner."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from pytorch_metric_learning import distances

from helpers.formulas import contextual_similarity_formula, has_no_near_ties, norms_fit_float32
from helpers.state import assert_refused_without_change, same_state
from helpers.strategies import NON_FINITE, batches, seeds, shapes, small_shapes
from pml_extras.functional._kernels.self_matches import self_match_mask
from pml_extras.miners import ContextualSimilarityMiner

DISTANCES = {
    "cosine": distances.CosineSimilarity,
    "dot product": lambda: distances.DotProductSimilarity(normalize_embeddings=False),
    "euclidean": distances.LpDistance,
    "raw euclidean": lambda: distances.LpDistance(normalize_embeddings=False),
    "squared": lambda: distances.LpDistance(normalize_embeddings=False, power=2),
    "manhattan": lambda: distances.LpDistance(p=1),
    "signal to noise": distances.SNRDistance,
}
WITH_REFERENCES = pytest.mark.parametrize("with_references", [False, True])
# Uneven numbers, so that no difference of similarities equals a margin by chance.
MARGINS = st.sampled_from([0.0, 0.100301, 0.500701, 2.0])


def draw_miner(data, **kwargs):
    return ContextualSimilarityMiner(
        num_neighbors=data.draw(st.sampled_from([1, 2, 3, 4, 5, 8, 50])),
        margin=data.draw(MARGINS),
        filter_noise=data.draw(st.booleans()),
        distance=DISTANCES[data.draw(st.sampled_from(list(DISTANCES)))](),
        **kwargs,
    )


def self_matches(x, ref):
    if ref is None:
        return torch.eye(len(x), dtype=torch.bool)
    return self_match_mask(x, ref)


def as_set(anchors, others):
    return set(zip(anchors.tolist(), others.tolist(), strict=True))


def mine_pair_by_pair(miner, table, y, ref_table, ref_y, self_match_mask):
    """The pairs that the rules of contextual_pairs select, checked one pair at a time.

    None if rounding could decide about a pair.
    """
    k, margin, tolerance = miner.num_neighbors, miner.margin, 1e-9
    near_ties = []

    def above(a, b):
        if abs(a - b) < tolerance and not (a == b == 0) and abs(a) != float("inf"):
            near_ties.append((a, b))
        return a > b

    n, r = table.shape
    s = contextual_similarity_formula(table, k, 0.0, ref_table)
    ref_s = s if ref_table is None else contextual_similarity_formula(ref_table, k, 0.0)
    labels, ref_labels = y.tolist(), ref_y.tolist()

    def label_vote(similarity, i, label, excluded):
        votes = {}
        for j in range(r):
            if not excluded[j]:
                votes[ref_labels[j]] = votes.get(ref_labels[j], 0.0) + float(similarity[i, j])
        target = votes.pop(label, 0.0)
        others = max(votes.values(), default=0.0)
        total = target + sum(votes.values())
        return (target / total if total > 0 else 0.5), not above(others, target)

    votes = [label_vote(s, i, labels[i], self_match_mask[i]) for i in range(n)]
    diagonal = torch.eye(r, dtype=torch.bool)
    ref_votes = votes
    if ref_table is not None:
        ref_votes = [label_vote(ref_s, j, ref_labels[j], diagonal[j]) for j in range(r)]
    positives, negatives = set(), set()
    for i in range(n):
        candidates = [j for j in range(r) if not self_match_mask[i, j]]
        valid, probably_clean = [], {}
        for j in candidates:
            probably_clean[j] = votes[i][1] and ref_votes[j][1]
            if labels[i] == ref_labels[j]:
                is_valid = above(float(s[i, j]), 0.25) or probably_clean[j]
            else:
                is_valid = not above(float(s[i, j]), min(votes[i][0], ref_votes[j][0]))
            if is_valid or not miner.filter_noise:
                valid.append(j)
        if not valid:
            valid, probably_clean = candidates, dict.fromkeys(candidates, True)
        if not miner.filter_noise:
            probably_clean = dict.fromkeys(candidates, True)
        pos = [j for j in valid if labels[i] == ref_labels[j]]
        neg = [j for j in valid if labels[i] != ref_labels[j]]
        if not pos or not neg:
            continue
        hardest_negative = max(float(s[i, j]) for j in neg)
        hardest_positive = min(float(s[i, j]) for j in pos)
        nearest_negative = min(float(table[i, j]) for j in neg)
        farthest_positive = max(float(table[i, j]) for j in pos)
        for j in pos:
            value, distance = float(s[i, j]), float(table[i, j])
            if above(hardest_negative + margin, value) and (
                value > 0 or (probably_clean[j] and above(distance, nearest_negative))
            ):
                positives.add((i, j))
        for j in neg:
            value, distance = float(s[i, j]), float(table[i, j])
            if above(value, hardest_positive - margin) and (
                value > 0 or (probably_clean[j] and above(farthest_positive, distance))
            ):
                negatives.add((i, j))
    return None if near_ties else (positives, negatives)


def assert_pairs_are_valid(mined, x, y, ref, ref_y):
    r, r_y = (x, y) if ref is None else (ref, ref_y)
    assert len(mined) == 4
    assert all(i.dtype == torch.long and i.ndim == 1 for i in mined)
    a1, p, a2, n = mined
    for anchors, others in ((a1, p), (a2, n)):
        assert len(anchors) == len(others)
        assert all(0 <= a < len(x) for a in anchors.tolist())
        assert all(0 <= o < len(r) for o in others.tolist())
        assert len(as_set(anchors, others)) == len(anchors)
        assert not self_matches(x, ref)[anchors, others].any()
    assert (y[a1] == r_y[p]).all()
    assert not (y[a2] == r_y[n]).any()
    assert as_set(a1, p).isdisjoint(as_set(a2, n))


@WITH_REFERENCES
@given(data=st.data(), non_finite=st.booleans())
def test_pairs_have_matching_labels_and_no_duplicates(data, non_finite, with_references):
    x, y, ref, ref_y = data.draw(batches(shapes, with_references, non_finite=non_finite))
    miner = draw_miner(data)
    mined = miner(x.requires_grad_(), y, ref, ref_y)
    assert_pairs_are_valid(mined, x.detach(), y, ref, ref_y)
    assert same_state(miner.state_dict(), {})
    again = miner(x, y, ref, ref_y)
    assert all(torch.equal(a, b) for a, b in zip(mined, again, strict=True))


def draw_case_without_near_ties(data, with_references):
    """A miner, its inputs, and the pairs that it should find, as sets."""
    case = batches(small_shapes, with_references, dtype=torch.float64, extreme=False)
    x, y, ref, ref_y = data.draw(case)
    miner = draw_miner(data)
    r, r_y = (x, y) if ref is None else (ref, ref_y)
    assume(len(r))
    table = miner._distances(x, r)
    ref_table = None if ref is None else miner._distances(ref, ref)
    assume(table.isfinite().all() and (ref_table is None or ref_table.isfinite().all()))
    size = float(table.abs().max()) or 1.0
    rounding = 1e-9 * max(size, 1e-3)
    assume(has_no_near_ties(table, miner.num_neighbors, 0.0, ref_table, tolerance=rounding))
    scaled_ref = None if ref_table is None else ref_table / size
    expected = mine_pair_by_pair(miner, table / size, y, scaled_ref, r_y, self_matches(x, ref))
    assume(expected is not None)
    return miner, x, y, ref, ref_y, expected


@WITH_REFERENCES
@given(data=st.data())
def test_pairs_follow_the_rules(data, with_references):
    miner, x, y, ref, ref_y, expected = draw_case_without_near_ties(data, with_references)
    a1, p, a2, n = miner(x, y, ref, ref_y)
    assert as_set(a1, p) == expected[0]
    assert as_set(a2, n) == expected[1]


@WITH_REFERENCES
@given(data=st.data())
def test_sample_order_does_not_matter(data, with_references):
    miner, x, y, ref, ref_y, _ = draw_case_without_near_ties(data, with_references)
    generator = torch.Generator().manual_seed(data.draw(seeds))
    order = torch.randperm(len(x), generator=generator)
    ref_order = order if ref is None else torch.randperm(len(ref), generator=generator)
    a1, p, a2, n = miner(x, y, ref, ref_y)
    permuted_ref = (None, None) if ref is None else (ref[ref_order], ref_y[ref_order])
    b1, q, b2, m = miner(x[order], y[order], *permuted_ref)
    assert as_set(order[b1], ref_order[q]) == as_set(a1, p)
    assert as_set(order[b2], ref_order[m]) == as_set(a2, n)


@WITH_REFERENCES
@given(data=st.data(), exponent=st.integers(-6, 6))
def test_embedding_norms_do_not_matter(data, exponent, with_references):
    x, y, ref, ref_y = data.draw(batches(shapes, with_references, extreme=False))
    miner = draw_miner(data)
    factor = 2.0**exponent
    for rows in (x, ref):
        if rows is not None:
            scaled = rows * factor
            assume(scaled.isfinite().all() and torch.equal(scaled / factor, rows))
            assume(norms_fit_float32(rows * 1e-3))
    # The rounding of other distances depends on the norms, as does PML's guard against 1 / 0.
    assume(isinstance(miner.distance, distances.DotProductSimilarity))
    before = miner(x, y, ref, ref_y)
    after = miner(x * factor, y, None if ref is None else ref * factor, ref_y)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@WITH_REFERENCES
@pytest.mark.parametrize("distance", DISTANCES)
@given(data=st.data())
def test_a_non_finite_row_does_not_suppress_other_pairs(data, distance, with_references):
    """A non-finite sample is mined as one that is farther away than all others, without pairs."""
    generator = torch.Generator().manual_seed(data.draw(seeds))
    y = torch.arange(24) % 4
    x = torch.randn(4, 8, generator=generator)[y] + torch.randn(24, 8, generator=generator)
    # The margin is uneven, so that no difference of similarities equals it by chance.
    miner = ContextualSimilarityMiner(margin=1.000301, distance=DISTANCES[distance]())
    x = x.double()
    row = data.draw(st.integers(0, 23))
    with_non_finite = x.clone()
    with_non_finite[row] = data.draw(st.sampled_from(NON_FINITE))
    if with_references:
        batch, ref = x, with_non_finite
        mined = miner(batch, y, ref, y)
    else:
        batch = ref = with_non_finite
        mined = miner(batch, y)
    assert all(len(indices) for indices in mined)

    def with_farthest_sample(table):
        missing = ~table.isfinite()
        far = 10 * table[~missing].abs().max() + 1
        return table.masked_fill(missing, far), missing

    table, missing = with_farthest_sample(miner._distances(batch, ref))
    assert missing[:, row].all()
    ref_table = with_farthest_sample(miner._distances(ref, ref))[0] if with_references else None
    excluded = missing | self_matches(batch, ref if with_references else None)
    expected = mine_pair_by_pair(miner, table, y, ref_table, y, excluded)
    assume(expected is not None)
    assert as_set(mined[0], mined[1]) == expected[0]
    assert as_set(mined[2], mined[3]) == expected[1]


@given(data=st.data())
def test_invalid_input_is_refused(data):
    n, d = data.draw(small_shapes)
    miner = draw_miner(data)
    torch.manual_seed(data.draw(seeds))
    d += 1  # PML's distances broadcast references of size 1
    x, y = torch.randn(n, d), torch.arange(n)
    invalid_calls = {
        "fewer labels": lambda: miner(x, y[1:]),
        "label columns": lambda: miner(x, y[:, None]),
        "vectors": lambda: miner(x[:, 0], y),
        "references without labels": lambda: miner(x, y, ref_emb=x.clone()),
        "references of another size": lambda: miner(x, y, torch.randn(n, d + 1), y),
        "fewer reference labels": lambda: miner(x, y, x.clone(), y[1:]),
    }
    for name, invalid_call in invalid_calls.items():
        assert_refused_without_change(miner, invalid_call, name)
