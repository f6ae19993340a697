"""Properties of ContextualLoss and its three terms."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from pytorch_metric_learning.reducers import DoNothingReducer

from helpers.formulas import (
    contextual_similarity_formula,
    gradients_fit_dtype,
    has_no_near_ties,
    normalized,
    norms_fit_float32,
)
from helpers.state import assert_refused_without_change
from helpers.strategies import (
    any_labels,
    batches,
    embeddings,
    seeds,
    shapes,
    small_shapes,
)
from pml_extras.functional import contextual_loss, contextual_similarity, pairwise_cosine
from pml_extras.losses import ContextualLoss

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

NEIGHBORS = st.sampled_from([1, 2, 3, 4, 5, 8, 50])
SLACKS = st.sampled_from([0.0, 1e-3, 0.05, 0.5, 2.0, 4.0])
WITH_REFERENCES = pytest.mark.parametrize("with_references", [False, True])


def draw_loss(data, **kwargs):
    return ContextualLoss(
        num_neighbors=data.draw(NEIGHBORS),
        neighborhood_slack=data.draw(SLACKS),
        pos_margin=data.draw(st.sampled_from([-1.0, 0.75, 1.0])),
        neg_margin=data.draw(st.sampled_from([-1.0, 0.6, 1.0])),
        target_similarity=data.draw(st.sampled_from([-1.0, 0.25, 1.0])),
        **kwargs,
    )


def draw_pairs(data, y, ref_y):
    generator = torch.Generator().manual_seed(data.draw(seeds))
    sizes = [data.draw(st.integers(0, 12)) for _ in range(2)]
    if data.draw(st.booleans()):  # triplets
        a, p, n = (
            torch.randint(m, sizes[:1], generator=generator)
            for m in (len(y), len(ref_y), len(ref_y))
        )
        return (a, p, n), (a, p, a, n)
    pairs = tuple(
        torch.randint(m, (size,), generator=generator)
        for size in sizes
        for m in (len(y), len(ref_y))
    )
    return pairs, pairs


def terms(loss_func, x, y, indices, ref, ref_y):
    loss_func.reducer = DoNothingReducer()
    return {k: v["losses"] for k, v in loss_func(x, y, indices, ref, ref_y).items()}


def contrastive_formula(loss_func, similarities, pairs):
    loss = 0.0
    a1, p, a2, n = pairs
    for excess in (
        loss_func.pos_margin - similarities[a1, p],
        similarities[a2, n] - loss_func.neg_margin,
    ):
        active = excess[excess > 0]
        loss += float(active.mean()) if len(active) else 0.0
    return loss


@WITH_REFERENCES
@given(data=st.data(), with_tuple=st.booleans())
def test_values_and_gradients_are_bounded(data, with_tuple, with_references):
    x, y, ref, ref_y = data.draw(batches(shapes, with_references))
    x.requires_grad_()
    loss_func = draw_loss(data)
    indices = None
    if with_tuple and len(x) and (ref is None or len(ref)):
        indices = draw_pairs(data, y, y if ref is None else ref_y)[0]
    loss = loss_func(x, y, indices, ref, ref_y)
    loss.backward()
    assert loss.isfinite()
    # The weights times the largest values of the terms: 0.4 * 1 + 0.5 * (2 + 2) + 0.1 * 2**2.
    assert -1e-5 <= loss <= 2.8 + 1e-4
    if gradients_fit_dtype(x, 1e3):
        assert x.grad.isfinite().all()
    if len(x) and (ref is None or len(ref)):
        context = terms(loss_func, x, y, indices, ref, ref_y)["contextual_loss"] / 0.4
        assert context.shape == (len(x),)
        assert (context >= 0).all()
        assert (context <= 1 + 1e-5).all()


@WITH_REFERENCES
@given(data=st.data(), with_tuple=st.booleans())
def test_values_match_the_formulas(data, with_tuple, with_references):
    x, y, ref, ref_y = data.draw(batches(small_shapes, with_references))
    loss_func = draw_loss(
        data, contextual_weight=1.0, contrastive_weight=1.0, similarity_weight=1.0
    )
    r, r_y = (x, y) if ref is None else (ref, ref_y)
    assume(len(r))
    assume(norms_fit_float32(x, r))
    k, slack = loss_func.num_neighbors, loss_func.neighborhood_slack
    s, rr = normalized(x) @ normalized(r).T, normalized(r) @ normalized(r).T
    distances = (2 - 2 * s).clamp_min(0)
    ref_distances = None if ref is None else (2 - 2 * rr).clamp_min(0)
    assume(has_no_near_ties(distances, k, slack, ref_distances))

    same = y[:, None] == r_y
    self_match_mask = (
        (x[:, None].double() == r.double()).all(2) if ref is not None else torch.eye(len(x)) > 0
    )
    assume(not (x == 0).any(1).any())  # -0.0 and 0.0 are equal but not duplicates
    pairs = (*same.nonzero().T, *(~same).nonzero().T)
    if ref is None:
        pairs = (*(same & ~self_match_mask).nonzero().T, *pairs[2:])
    indices = None
    if with_tuple:
        indices, pairs = draw_pairs(data, y, r_y)
    context = contextual_similarity_formula(distances, k, slack, ref_distances)
    errors = (context - same.double()).square()
    expected = {
        "contextual_loss": (errors * ~self_match_mask).sum(1).mean() / len(r),
        "contrastive_loss": contrastive_formula(loss_func, s, pairs),
        "similarity_loss": (s.mean() - loss_func.target_similarity) ** 2,
    }
    # The contrastive loss has thresholds, too.
    margins = (loss_func.pos_margin - s).abs().min(), (s - loss_func.neg_margin).abs().min()
    actual = terms(loss_func, x, y, indices, ref, ref_y)
    for name, value in expected.items():
        if name == "contrastive_loss" and min(margins) < 1e-4:
            continue
        assert float(actual[name].mean()) == pytest.approx(float(value), abs=2e-5), name


@WITH_REFERENCES
@given(data=st.data())
def test_sample_order_does_not_matter(data, with_references):
    x, y, ref, ref_y = data.draw(batches(small_shapes, with_references, extreme=False))
    loss_func = draw_loss(data)
    r = x if ref is None else ref
    assume(len(r) and norms_fit_float32(x, r))
    s, rr = normalized(x) @ normalized(r).T, normalized(r) @ normalized(r).T
    tables = 2 - 2 * s, None if ref is None else 2 - 2 * rr
    slack = loss_func.neighborhood_slack
    assume(has_no_near_ties(tables[0], loss_func.num_neighbors, slack, tables[1]))
    assume((loss_func.pos_margin - s).abs().min() > 1e-4)
    assume((s - loss_func.neg_margin).abs().min() > 1e-4)
    generator = torch.Generator().manual_seed(data.draw(seeds))
    order = torch.randperm(len(x), generator=generator)
    expected = terms(loss_func, x, y, None, ref, ref_y)
    if ref is not None:
        ref_order = torch.randperm(len(ref), generator=generator)
        ref, ref_y = ref[ref_order], ref_y[ref_order]
    actual = terms(loss_func, x[order], y[order], None, ref, ref_y)
    for name in expected:
        assert torch.allclose(actual[name], expected[name][order], atol=2e-5), name


@WITH_REFERENCES
@given(data=st.data(), exponent=st.integers(-6, 6))
def test_embedding_norms_do_not_matter(data, exponent, with_references):
    x, y, ref, ref_y = data.draw(batches(shapes, with_references, extreme=False))
    loss_func = draw_loss(data)
    factor = 2.0**exponent
    for rows in (x, ref):
        if rows is not None:
            scaled = rows * factor
            assume(scaled.isfinite().all() and torch.equal(scaled / factor, rows))
            assume(norms_fit_float32(rows * 1e-3))
    x.requires_grad_()
    loss = loss_func(x, y, None, ref, ref_y)
    scaled_loss = loss_func(x * factor, y, None, None if ref is None else ref * factor, ref_y)
    assert torch.equal(loss, scaled_loss)


@given(data=st.data())
def test_similarity_is_symmetric_and_in_the_unit_interval(data):
    n, d = data.draw(shapes)
    x = data.draw(embeddings(n, d))
    assume(n)
    k, slack = data.draw(NEIGHBORS), data.draw(SLACKS)
    distances = (2 - 2 * pairwise_cosine(x)).clamp_min(0)
    context = contextual_similarity(distances, num_neighbors=k, slack=slack)
    assert torch.equal(context, context.T)
    assert (context >= 0).all()
    assert (context <= 1 + 1e-6).all()
    queries = data.draw(embeddings(data.draw(st.integers(1, 9)), d, dtype=x.dtype))
    query_distances = (2 - 2 * pairwise_cosine(queries, x)).clamp_min(0)
    context = contextual_similarity(query_distances, distances, num_neighbors=k, slack=slack)
    assert context.shape == (len(queries), n)
    assert (context >= 0).all()
    assert (context <= 1 + 1e-6).all()


@given(data=st.data())
def test_references_equal_to_the_batch_change_nothing(data):
    """Queries that equal the references get the same similarities as a batch without any."""
    n, d = data.draw(small_shapes)
    x = data.draw(embeddings(n, d, dtype=torch.float64, extreme=False))
    k, slack = data.draw(NEIGHBORS), data.draw(SLACKS)
    s = normalized(x) @ normalized(x).T
    s.fill_diagonal_(1)  # within a batch, each sample is its own nearest neighbor
    s = torch.minimum(s, torch.ones(()))
    assume(has_no_near_ties(2 - 2 * s, k, slack, tolerance=1e-9))
    d = 2 - 2 * s
    one = contextual_similarity(d, num_neighbors=k, slack=slack)
    other = contextual_similarity(d, d, num_neighbors=k, slack=slack)
    assert torch.allclose(one, other, atol=1e-9)


@WITH_REFERENCES
@given(data=st.data(), collect_stats=st.booleans())
def test_non_finite_rows_raise_no_error(data, collect_stats, with_references):
    x, y, ref, ref_y = data.draw(batches(shapes, with_references, non_finite=True))
    loss_func = draw_loss(data, collect_stats=collect_stats)
    loss = loss_func(x.requires_grad_(), y, None, ref, ref_y)
    loss.backward()
    assert loss.ndim == 0
    if x.isfinite().all() and (ref is None or ref.isfinite().all()):
        assert loss.isfinite()


@given(data=st.data())
def test_copies_of_the_sample_do_not_count(data):
    n, d = data.draw(small_shapes)
    x, y = data.draw(embeddings(n, d)), data.draw(any_labels(n))
    copies = x[:1].expand(n, d).contiguous()
    losses = contextual_loss(copies, y, copies.clone(), y).contextual
    assert torch.equal(losses, torch.zeros(n, dtype=losses.dtype))


@given(data=st.data())
def test_invalid_input_is_refused(data):
    n, d = data.draw(small_shapes)
    loss_func = ContextualLoss()
    torch.manual_seed(data.draw(seeds))
    x, y = torch.randn(n, d), torch.arange(n)
    index = torch.zeros(1).long()
    invalid_calls = {
        "no labels": lambda: loss_func(x),
        "fewer labels": lambda: loss_func(x, y[1:]),
        "label columns": lambda: loss_func(x, y[:, None]),
        "integers": lambda: loss_func(x.long(), y),
        "vectors": lambda: loss_func(x[:, 0], y),
        "references without labels": lambda: loss_func(x, y, ref_emb=x.clone()),
        "references of another size": lambda: loss_func(
            x, y, ref_emb=torch.randn(n, d + 1), ref_labels=y
        ),
        "fewer reference labels": lambda: loss_func(x, y, ref_emb=x.clone(), ref_labels=y[1:]),
        "pairs out of range": lambda: loss_func(x, y, (index, index, index, index + n)),
    }
    for name, invalid_call in invalid_calls.items():
        assert_refused_without_change(loss_func, invalid_call, name)
