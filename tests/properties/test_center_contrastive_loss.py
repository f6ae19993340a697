"""Properties of CenterContrastiveLoss, for both kinds of center update."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from pytorch_metric_learning.reducers import DoNothingReducer

from helpers.formulas import gradients_fit_dtype, normalized, norms_fit_float32
from helpers.state import assert_refused_without_change, same_state, state_is_finite, state_of
from helpers.strategies import class_labels, embeddings, log_uniform, seeds, shapes, small_shapes
from pml_extras.losses import CenterContrastiveLoss

CENTER_UPDATES = pytest.mark.parametrize("center_update", ["gradient", "ema"])
WEIGHTS = st.sampled_from([0.0, 1.5, 1e3])


def draw_loss(data, num_classes, d, center_update, **kwargs):
    torch.manual_seed(data.draw(seeds))
    return CenterContrastiveLoss(
        num_classes,
        d,
        scale=data.draw(log_uniform(-3, 4)),
        margin=data.draw(st.sampled_from([0.0, 0.2, 2.0])),
        center_weight=data.draw(WEIGHTS),
        center_update=center_update,
        momentum=data.draw(st.sampled_from([0.0, 0.5, 0.9, 1.0])),
        negative_classes=data.draw(st.sampled_from(["all", "batch"])),
        label_smoothing=data.draw(st.sampled_from([0.0, 0.1, 0.9])),
        **kwargs,
    )


def draw_batch(data, n, d, num_classes, **kwargs):
    return data.draw(embeddings(n, d, **kwargs)), data.draw(class_labels(n, num_classes))


def per_sample(loss_func, x, y, *args):
    if len(x) == 0:
        return x.sum(1)
    reducer, loss_func.reducer = loss_func.reducer, DoNothingReducer()
    losses = loss_func(x, y, *args)["loss"]["losses"]
    loss_func.reducer = reducer
    return losses


def loss_formula(loss_func, x, y):
    """The docstring's formula in float64, with the current centers."""
    x, c, y = normalized(x), normalized(loss_func.centers.detach()), y.long()
    rows = torch.arange(len(x))
    z = loss_func.scale * x @ c.T
    distances = 2 - 2 * z[rows, y] / loss_func.scale
    z[rows, y] -= loss_func.scale * loss_func.margin
    class_mask = torch.ones(len(x), len(c), dtype=torch.bool)
    if loss_func.center_update == "ema":
        class_mask = (loss_func.class_counts > 0).expand(len(x), -1).clone()
    if loss_func.negative_classes == "batch":
        class_mask &= (torch.arange(len(c)) == y[:, None]).any(0)
    class_mask[rows, y] = True
    log_p = z.masked_fill(~class_mask, -1e300).log_softmax(1)
    smoothing = loss_func.label_smoothing
    loss = -(1 - smoothing) * log_p[rows, y]
    loss = loss - smoothing * (log_p * class_mask).sum(1) / class_mask.sum(1)
    return loss + loss_func.center_weight * distances


def tolerance(loss_func, losses):
    return 1e-5 * (1 + losses.abs() + loss_func.scale + loss_func.center_weight)


@CENTER_UPDATES
@given(data=st.data(), num_classes=st.integers(1, 12))
def test_values_match_the_formula_and_gradients_are_finite(data, num_classes, center_update):
    n, d = data.draw(shapes)
    loss_func = draw_loss(data, num_classes, d, center_update)
    x, y = draw_batch(data, n, d, num_classes)
    x.requires_grad_()
    loss = loss_func(x, y)
    loss.backward()
    assert loss.isfinite()
    assert loss >= -tolerance(loss_func, torch.zeros(()))
    slope = 2 * loss_func.scale + 4 * loss_func.center_weight
    if gradients_fit_dtype(x, slope):
        assert x.grad.isfinite().all()
    if center_update == "gradient" and n:
        assert loss_func.centers.grad.isfinite().all()
    if n and norms_fit_float32(x.detach(), loss_func.centers.detach()):
        expected = loss_formula(loss_func, x.detach(), y)
        loss_func.eval()
        actual = per_sample(loss_func, x.detach(), y)
        assert ((actual - expected).abs() <= tolerance(loss_func, expected)).all()
        assert (loss - expected.mean()).abs() <= tolerance(loss_func, expected).mean()


@given(data=st.data(), num_classes=st.integers(1, 12))
def test_ema_centers_match_the_formula(data, num_classes):
    n, d = data.draw(shapes)
    loss_func = draw_loss(data, num_classes, d, "ema")
    for _ in range(data.draw(st.integers(1, 3))):
        x, y = draw_batch(data, n, d, num_classes)
        assume(norms_fit_float32(x))
        old, old_counts = loss_func.centers.double(), loss_func.class_counts.clone()
        loss_func(x, y)
        for c in range(num_classes):
            class_rows = normalized(x)[y.long() == c]
            assert loss_func.class_counts[c] == old_counts[c] + len(class_rows)
            if len(class_rows) == 0:
                assert torch.equal(loss_func.centers[c].double(), old[c])
                continue
            mean = class_rows.mean(0)
            new = mean / mean.norm().clamp_min(1e-12)
            if old_counts[c]:
                new = loss_func.momentum * old[c] + (1 - loss_func.momentum) * new
            # Opposite embeddings cancel out and leave only rounding errors.
            if mean.norm() > 1e-2 and new.norm() > 1e-2:
                error = loss_func.centers[c].double() - new / new.norm()
                assert error.norm() < 1e-4
        assert state_is_finite(state_of(loss_func))
        norms = loss_func.centers.double().norm(dim=1)
        assert (norms < 1 + 1e-5).all()


@given(data=st.data(), num_classes=st.integers(1, 12))
def test_ema_centers_ignore_non_finite_rows(data, num_classes):
    n, d = data.draw(shapes)
    on_all_rows = draw_loss(data, num_classes, d, "ema")
    on_finite_rows = copy.deepcopy(on_all_rows)
    for _ in range(2):
        x, y = draw_batch(data, n, d, num_classes, non_finite=True)
        finite = x.float().isfinite().all(1)
        loss = on_all_rows(x, y)
        on_finite_rows(x[finite], y.long()[finite])
        assert same_state(on_all_rows.state_dict(), on_finite_rows.state_dict())
        if finite.all():
            assert loss.isfinite()
        elif n:
            losses = per_sample(on_all_rows.eval(), x, y)
            assert losses[finite].isfinite().all()
            on_all_rows.train()
    assert state_is_finite(on_all_rows.state_dict())


@CENTER_UPDATES
@given(data=st.data(), num_classes=st.integers(1, 12))
def test_sample_order_does_not_matter(data, num_classes, center_update):
    n, d = data.draw(shapes)
    one = draw_loss(data, num_classes, d, center_update)
    other = copy.deepcopy(one)
    x, y = draw_batch(data, n, d, num_classes, non_finite=True)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(data.draw(seeds)))
    losses, permuted = per_sample(one, x, y), per_sample(other, x[order], y.long()[order])
    assert same_state(one.state_dict(), other.state_dict())
    error = (permuted - losses[order]).abs()
    assert ((error <= tolerance(one, losses[order])) | error.isnan()).all()


@CENTER_UPDATES
@given(data=st.data(), num_classes=st.integers(1, 12), exponent=st.integers(-6, 6))
def test_embedding_norms_do_not_matter(data, num_classes, exponent, center_update):
    n, d = data.draw(shapes)
    one = draw_loss(data, num_classes, d, center_update)
    other = copy.deepcopy(one)
    x, y = draw_batch(data, n, d, num_classes, extreme=False)
    scaled = x * 2.0**exponent
    assume(scaled.isfinite().all() and torch.equal(scaled / 2.0**exponent, x))
    assume(norms_fit_float32(x * 1e-3))
    with torch.no_grad():
        if center_update == "gradient":
            other.centers *= 2.0**exponent
    assert torch.equal(per_sample(one, x, y), per_sample(other, scaled, y))
    if center_update == "ema":
        assert same_state(one.state_dict(), other.state_dict())


@CENTER_UPDATES
@given(data=st.data(), num_classes=st.integers(1, 12), smoothing=st.sampled_from([0.0, 0.1]))
def test_eval_mode_keeps_the_state(data, num_classes, smoothing, center_update):
    n, d = data.draw(shapes)
    loss_func = draw_loss(data, num_classes, d, center_update, collect_stats=True)
    loss_func.label_smoothing = smoothing
    if data.draw(st.booleans(), label="trained before"):
        loss_func(*draw_batch(data, n, d, num_classes))
    loss_func.eval()
    before = state_of(loss_func)
    x, y = draw_batch(data, n, d, num_classes)
    loss = loss_func(x, y)
    assert loss.isfinite()
    assert torch.equal(loss_func(x, y), loss)
    assert same_state(loss_func.state_dict(), before)
    logits = loss_func.get_logits(x)
    assert logits.shape == (n, num_classes)
    assert not logits.isnan().any()


@CENTER_UPDATES
@given(data=st.data(), num_classes=st.integers(1, 12))
def test_a_miners_tuples_weight_the_samples(data, num_classes, center_update):
    n, d = data.draw(small_shapes)
    loss_func = draw_loss(data, num_classes, d, center_update)
    x, y = draw_batch(data, n, d, num_classes)
    loss_func(x, y)
    loss_func.eval()
    generator = torch.Generator().manual_seed(data.draw(seeds))
    pairs = data.draw(st.integers(0, 10))
    indices = tuple(
        torch.randint(n, (pairs,), generator=generator)
        for _ in range(data.draw(st.sampled_from([3, 4])))
    )
    counts = torch.cat(indices).bincount(minlength=n).double()
    weights = counts / counts.max() if pairs else torch.ones(n)
    expected = per_sample(loss_func, x, y).double() * weights
    assert torch.allclose(per_sample(loss_func, x, y, indices).double(), expected, rtol=1e-5)


@CENTER_UPDATES
@given(data=st.data())
def test_refused_input_does_not_change_the_state(data, center_update):
    (n, d), c = data.draw(small_shapes), 5
    loss_func = draw_loss(data, c, d, center_update)
    x, y = torch.randn(n, d), torch.randint(c, (n,))
    loss_func(x, y)
    invalid_labels = y.clone()
    invalid_labels[data.draw(st.integers(0, n - 1))] = data.draw(
        st.sampled_from([-1, c, 2**40, -(2**63), 2**63 - 1])
    )
    index = torch.zeros(1).long()
    out_of_range = index + n
    invalid_calls = {
        "label out of range": lambda: loss_func(x, invalid_labels),
        "no labels": lambda: loss_func(x),
        "float labels": lambda: loss_func(x, y.float()),
        "fewer labels": lambda: loss_func(x, y[1:]),
        "label columns": lambda: loss_func(x, y[:, None]),
        "wide": lambda: loss_func(torch.randn(n, d + 1), y),
        "vectors": lambda: loss_func(x[:, 0], y),
        "images": lambda: loss_func(x[:, :, None], y),
        "integers": lambda: loss_func(x.long(), y),
        "complex": lambda: loss_func(x.cfloat(), y),
        "references": lambda: loss_func(x, y, ref_emb=x.clone(), ref_labels=y.clone()),
        "triplets out of range": lambda: loss_func(x, y, (index, index, out_of_range)),
        "pairs out of range": lambda: loss_func(x, y, (index, index, index, out_of_range)),
        "float tuple": lambda: loss_func(x, y, (index, index, index + 0.5)),
    }
    for name, invalid_call in invalid_calls.items():
        assert_refused_without_change(loss_func, invalid_call, name)


@given(
    data=st.data(),
    name=st.sampled_from(
        ["num_classes", "embedding_size", "scale", "margin", "center_weight", "momentum"]
    ),
    value=st.sampled_from([-1.0, float("nan"), -float("inf")]),
)
def test_hyperparameters_are_checked(data, name, value):
    with pytest.raises(ValueError, match=name):
        CenterContrastiveLoss(**{"num_classes": 2, "embedding_size": 2, name: value})
