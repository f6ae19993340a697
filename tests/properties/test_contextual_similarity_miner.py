"""Properties of ContextualSimilarityMiner."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from pytorch_metric_learning import distances

from helpers.formulas import contextual_similarity_formula, has_no_near_ties, norms_fit_float32
from helpers.state import assert_refused_without_change, same_state
from helpers.strategies import NON_FINITE, any_labels, embeddings, seeds, shapes, small_shapes
from pml_extras.functional.copies import exact_copies
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
# Odd numbers, which no sum of shares hits by chance.
MARGINS = st.sampled_from([0.0, 0.100301, 0.500701, 2.0])


def draw_call(data, shapes, with_references, **kwargs):
    n, d = data.draw(shapes)
    x, y = data.draw(embeddings(n, d, **kwargs)), data.draw(any_labels(n))
    if not with_references:
        return x, y, None, None
    others = data.draw(st.integers(0, 12))
    kwargs["dtype"] = x.dtype
    ref = data.draw(embeddings(others, d, **kwargs))
    if data.draw(st.booleans(), label="the references include the batch"):
        ref = torch.cat([x, ref])
    generator = torch.Generator().manual_seed(data.draw(seeds))
    ref_y = y.new_zeros(len(ref))
    if n:
        ref_y = y[torch.randint(n, (len(ref),), generator=generator)]
    return x, y, ref, ref_y


def draw_miner(data, **kwargs):
    return ContextualSimilarityMiner(
        num_neighbors=data.draw(st.sampled_from([1, 2, 3, 4, 5, 8, 50])),
        margin=data.draw(MARGINS),
        filter_noise=data.draw(st.booleans()),
        distance=DISTANCES[data.draw(st.sampled_from(list(DISTANCES)))](),
        **kwargs,
    )


def copies_in(x, ref):
    if ref is None:
        return torch.eye(len(x), dtype=torch.bool)
    return exact_copies(x, ref)


def as_set(anchors, others):
    return set(zip(anchors.tolist(), others.tolist(), strict=True))


def mine_pair_by_pair(miner, table, y, ref_table, ref_y, copies):
    """The rules of contextual_pairs, a pair at a time; None where rounding could decide."""
    k, margin, tolerance = miner.num_neighbors, miner.margin, 1e-9
    shaky = []

    def above(a, b):
        if abs(a - b) < tolerance and not (a == b == 0) and abs(a) != float("inf"):
            shaky.append((a, b))
        return a > b

    n, r = table.shape
    s = contextual_similarity_formula(table, k, 0.0, ref_table)
    own = s if ref_table is None else contextual_similarity_formula(ref_table, k, 0.0)
    labels, ref_labels = y.tolist(), ref_y.tolist()

    def vote(context, me, label, left_out):
        shares = {}
        for j in range(r):
            if not left_out[j]:
                shares[ref_labels[j]] = shares.get(ref_labels[j], 0.0) + float(context[me, j])
        mine = shares.pop(label, 0.0)
        others = max(shares.values(), default=0.0)
        total = mine + sum(shares.values())
        return (mine / total if total > 0 else 0.5), not above(others, mine)

    votes = [vote(s, i, labels[i], copies[i]) for i in range(n)]
    nobody = torch.eye(r, dtype=torch.bool)
    ref_votes = (
        votes if ref_table is None else [vote(own, j, ref_labels[j], nobody[j]) for j in range(r)]
    )
    positives, negatives = set(), set()
    for i in range(n):
        candidates = [j for j in range(r) if not copies[i, j]]
        kept, trusted = [], {}
        for j in candidates:
            trusted[j] = votes[i][1] and ref_votes[j][1]
            if labels[i] == ref_labels[j]:
                good = above(float(s[i, j]), 0.25) or trusted[j]
            else:
                good = not above(float(s[i, j]), min(votes[i][0], ref_votes[j][0]))
            if good or not miner.filter_noise:
                kept.append(j)
        if not kept:
            kept, trusted = candidates, dict.fromkeys(candidates, True)
        if not miner.filter_noise:
            trusted = dict.fromkeys(candidates, True)
        pos = [j for j in kept if labels[i] == ref_labels[j]]
        neg = [j for j in kept if labels[i] != ref_labels[j]]
        if not pos or not neg:
            continue
        top, bottom = max(float(s[i, j]) for j in neg), min(float(s[i, j]) for j in pos)
        near, far = min(float(table[i, j]) for j in neg), max(float(table[i, j]) for j in pos)
        for j in pos:
            value, distance = float(s[i, j]), float(table[i, j])
            if above(top + margin, value) and (value > 0 or (trusted[j] and above(distance, near))):
                positives.add((i, j))
        for j in neg:
            value, distance = float(s[i, j]), float(table[i, j])
            if above(value, bottom - margin) and (
                value > 0 or (trusted[j] and above(far, distance))
            ):
                negatives.add((i, j))
    return None if shaky else (positives, negatives)


def assert_valid(mined, x, y, ref, ref_y):
    r, r_y = (x, y) if ref is None else (ref, ref_y)
    assert len(mined) == 4
    assert all(i.dtype == torch.long and i.ndim == 1 for i in mined)
    a1, p, a2, n = mined
    for anchors, others in ((a1, p), (a2, n)):
        assert len(anchors) == len(others)
        assert all(0 <= a < len(x) for a in anchors.tolist())
        assert all(0 <= o < len(r) for o in others.tolist())
        assert len(as_set(anchors, others)) == len(anchors)
        assert not copies_in(x, ref)[anchors, others].any()
    assert (y[a1] == r_y[p]).all()
    assert not (y[a2] == r_y[n]).any()
    assert as_set(a1, p).isdisjoint(as_set(a2, n))


@WITH_REFERENCES
@given(data=st.data(), non_finite=st.booleans())
def test_pairs_are_valid(data, non_finite, with_references):
    x, y, ref, ref_y = draw_call(data, shapes, with_references, non_finite=non_finite)
    miner = draw_miner(data)
    mined = miner(x.requires_grad_(), y, ref, ref_y)
    assert_valid(mined, x.detach(), y, ref, ref_y)
    assert same_state(miner.state_dict(), {})
    again = miner(x, y, ref, ref_y)
    assert all(torch.equal(a, b) for a, b in zip(mined, again, strict=True))


@WITH_REFERENCES
@given(data=st.data())
def test_pairs_are_the_rules(data, with_references):
    x, y, ref, ref_y = draw_call(
        data, small_shapes, with_references, dtype=torch.float64, extreme=False
    )
    miner = draw_miner(data)
    r, r_y = (x, y) if ref is None else (ref, ref_y)
    assume(len(r))
    table = miner.distances(x, r)
    ref_table = None if ref is None else miner.distances(ref, ref)
    assume(table.isfinite().all() and (ref_table is None or ref_table.isfinite().all()))
    size = float(table.abs().max()) or 1.0
    rounding = 1e-9 * max(size, 1e-3)
    assume(has_no_near_ties(table, miner.num_neighbors, 0.0, ref_table, tolerance=rounding))
    scaled_ref = None if ref_table is None else ref_table / size
    expected = mine_pair_by_pair(miner, table / size, y, scaled_ref, r_y, copies_in(x, ref))
    assume(expected is not None)
    a1, p, a2, n = miner(x, y, ref, ref_y)
    assert as_set(a1, p) == expected[0]
    assert as_set(a2, n) == expected[1]


@WITH_REFERENCES
@given(data=st.data())
def test_order_does_not_matter(data, with_references):
    x, y, ref, ref_y = draw_call(
        data, small_shapes, with_references, dtype=torch.float64, extreme=False
    )
    miner = draw_miner(data)
    r, r_y = (x, y) if ref is None else (ref, ref_y)
    assume(len(r))
    table = miner.distances(x, r)
    ref_table = None if ref is None else miner.distances(ref, ref)
    assume(table.isfinite().all() and (ref_table is None or ref_table.isfinite().all()))
    size = float(table.abs().max()) or 1.0
    assume(has_no_near_ties(table, miner.num_neighbors, 0.0, ref_table, tolerance=1e-9 * size))
    scaled_ref = None if ref_table is None else ref_table / size
    copies = copies_in(x, ref)
    assume(mine_pair_by_pair(miner, table / size, y, scaled_ref, r_y, copies) is not None)
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
def test_scale_does_not_matter(data, exponent, with_references):
    x, y, ref, ref_y = draw_call(data, shapes, with_references, extreme=False)
    miner = draw_miner(data)
    factor = 2.0**exponent
    for rows in (x, ref):
        if rows is not None:
            scaled = rows * factor
            assume(scaled.isfinite().all() and torch.equal(scaled / factor, rows))
            assume(norms_fit_float32(rows * 1e-3))
    # cdist's tricks with squares and PML's guard against 0 in the denominator have scales.
    assume(isinstance(miner.distance, distances.DotProductSimilarity))
    before = miner(x, y, ref, ref_y)
    after = miner(x * factor, y, None if ref is None else ref * factor, ref_y)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@WITH_REFERENCES
@pytest.mark.parametrize("distance", DISTANCES)
@given(data=st.data())
def test_a_broken_row_does_not_silence_the_others(data, distance, with_references):
    """A sample that is not finite is nobody's neighbour: the rest is mined as without it."""
    generator = torch.Generator().manual_seed(data.draw(seeds))
    y = torch.arange(24) % 4
    x = torch.randn(4, 8, generator=generator)[y] + torch.randn(24, 8, generator=generator)
    miner = ContextualSimilarityMiner(margin=1.0, distance=DISTANCES[distance]())
    # float64, so that one more column cannot decide by rounding
    x = x.double()
    row = data.draw(st.integers(0, 23))
    broken = x.clone()
    broken[row] = data.draw(st.sampled_from(NON_FINITE))
    rest = torch.arange(24) != row
    mined = miner(x, y, broken, y) if with_references else miner(broken, y)
    assert all(len(indices) for indices in mined)
    if with_references:
        assert not (mined[1] == row).any()
        assert not (mined[3] == row).any()
    expected = miner(x, y, x[rest], y[rest]) if with_references else miner(x[rest], y[rest])
    assert len(mined[0]) == pytest.approx(len(expected[0]), abs=12)
    assert len(mined[2]) == pytest.approx(len(expected[2]), abs=24)


@given(data=st.data())
def test_refusals(data):
    n, d = data.draw(small_shapes)
    miner = draw_miner(data)
    torch.manual_seed(data.draw(seeds))
    d += 1  # PML's distances take references of size 1 for any size
    x, y = torch.randn(n, d), torch.arange(n)
    calls = {
        "fewer labels": lambda: miner(x, y[1:]),
        "label columns": lambda: miner(x, y[:, None]),
        "vectors": lambda: miner(x[:, 0], y),
        "references without labels": lambda: miner(x, y, ref_emb=x.clone()),
        "references of another size": lambda: miner(x, y, torch.randn(n, d + 1), y),
        "fewer reference labels": lambda: miner(x, y, x.clone(), y[1:]),
    }
    for name, call_wrongly in calls.items():
        assert_refused_without_change(miner, call_wrongly, name)
