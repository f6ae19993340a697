"""Properties of ClassInterferenceRegularizer, alone and attached."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from pytorch_metric_learning import losses, miners

from helpers.formulas import gradients_fit_dtype, normalized, norms_fit_float32
from helpers.state import assert_refused_without_change, same_state, state_is_finite, state_of
from helpers.strategies import class_labels, embeddings, seeds, shapes, small_shapes
from pml_extras.regularizers import ClassInterferenceRegularizer


def draw_regularizer(data, num_classes, d, **kwargs):
    hyperparameters = {
        "strength": data.draw(st.sampled_from([0.0, 0.1, 0.49])),
        "probability": data.draw(st.sampled_from([0.0, 0.5, 1.0])),
        "momentum": data.draw(st.sampled_from([0.0, 0.5, 0.9, 1.0])),
        "normalize": data.draw(st.booleans()),
        "random_strength": data.draw(st.booleans()),
        "generator": torch.Generator().manual_seed(data.draw(seeds)),
    }
    return ClassInterferenceRegularizer(num_classes, d, **(hyperparameters | kwargs))


def draw_batch(data, n, d, num_classes, **kwargs):
    return data.draw(embeddings(n, d, **kwargs)), data.draw(class_labels(n, num_classes))


@given(data=st.data(), num_classes=st.integers(2, 12))
def test_embeddings_move_toward_the_mean_of_another_class(data, num_classes):
    n, d = data.draw(shapes)
    regularizer = draw_regularizer(data, num_classes, d)
    for _ in range(data.draw(st.integers(0, 2))):
        regularizer.interfere(*draw_batch(data, n, d, num_classes, extreme=False))
    x, y = draw_batch(data, n, d, num_classes, extreme=False)
    x.requires_grad_()
    means, counts = regularizer.class_means.double(), regularizer.class_counts.clone()
    perturbed = regularizer.interfere(x, y)
    assert perturbed.shape == x.shape
    assert perturbed.dtype == x.dtype
    assert perturbed.isfinite().all()
    perturbed.sum().backward()
    if gradients_fit_dtype(x, 4):
        assert x.grad.isfinite().all()
    inputs = normalized(x.detach()) if regularizer.normalize else x.detach().double()
    eps = torch.finfo(x.dtype).eps + 1e-6
    for before, after, label in zip(inputs, perturbed.detach().double(), y.long(), strict=True):
        # Compare with the points on the segments from the embedding to the other classes' means.
        targets = means[(counts > 0) & (torch.arange(num_classes) != label)]
        candidates = [before[None]]
        if len(targets):
            if not regularizer.random_strength:
                candidates.append(before + regularizer.strength * (targets - before))
            else:
                direction = targets - before
                length = direction.square().sum(1, keepdim=True).clamp_min(1e-300)
                step_size = ((after - before) * direction).sum(1, keepdim=True) / length
                if regularizer.normalize:  # normalized afterwards, so search the segment
                    step_sizes = torch.linspace(0, regularizer.strength, 2000)[:, None, None]
                    candidates.append((before + step_sizes * direction).flatten(0, 1))
                else:
                    candidates.append(before + step_size.clamp(0, regularizer.strength) * direction)
        points = torch.cat(candidates)
        if regularizer.normalize:
            points = points / points.norm(dim=1, keepdim=True).clamp_min(1e-12)
        size = (
            1.0 if regularizer.normalize else float(points.abs().max()) + float(before.abs().max())
        )
        slack = 4 * eps * size * d**0.5
        if regularizer.normalize:
            # Normalizing a point close to zero magnifies rounding.
            slack = slack * 20 + (1e-3 if regularizer.random_strength else 0)
        assert (points - after).norm(dim=1).min() <= slack


@given(data=st.data(), num_classes=st.integers(2, 12))
def test_class_means_match_the_formula(data, num_classes):
    n, d = data.draw(shapes)
    regularizer = draw_regularizer(data, num_classes, d)
    for _ in range(data.draw(st.integers(1, 3))):
        x, y = draw_batch(data, n, d, num_classes)
        if regularizer.normalize:
            assume(norms_fit_float32(x))
        old, counts = regularizer.class_means.double(), regularizer.class_counts.clone()
        regularizer.interfere(x, y)
        inputs = normalized(x) if regularizer.normalize else x.double()
        for c in range(num_classes):
            class_rows = inputs[y.long() == c]
            assert regularizer.class_counts[c] == counts[c] + len(class_rows)
            expected = old[c]
            if len(class_rows):
                beta = regularizer.momentum if counts[c] else 0
                expected = beta * old[c] + (1 - beta) * class_rows.mean(0)
            size = float(torch.cat([class_rows.flatten(), old[c]]).abs().max())
            error = (regularizer.class_means[c].double() - expected).abs()
            assert (error <= 1e-6 * size + 1e-44).all()
    assert state_is_finite(regularizer.state_dict())


@given(data=st.data(), num_classes=st.integers(2, 12))
def test_class_means_ignore_non_finite_rows(data, num_classes):
    n, d = data.draw(shapes)
    on_all_rows = draw_regularizer(data, num_classes, d)
    on_finite_rows = ClassInterferenceRegularizer(
        num_classes, d, momentum=on_all_rows.momentum, normalize=on_all_rows.normalize
    )
    for _ in range(3):
        x, y = draw_batch(data, n, d, num_classes, non_finite=True, extreme=False)
        finite = x.isfinite().all(1)
        perturbed = on_all_rows.interfere(x, y)
        assert perturbed[finite].isfinite().all()
        on_finite_rows.interfere(x[finite], y.long()[finite])
        for name in ("class_means", "class_counts"):
            assert torch.equal(getattr(on_all_rows, name), getattr(on_finite_rows, name))
    assert state_is_finite(on_all_rows.state_dict())


@given(data=st.data(), num_classes=st.integers(2, 12))
def test_state_stays_finite(data, num_classes):
    n, d = data.draw(shapes)
    regularizer = draw_regularizer(data, num_classes, d)
    for _ in range(3):
        x, y = draw_batch(data, n, d, num_classes, non_finite=True)
        if data.draw(st.booleans()):
            x = x.double() * 1e200
        regularizer.interfere(x, y)
        assert state_is_finite(regularizer.state_dict())


@given(data=st.data(), num_classes=st.integers(2, 12))
def test_class_means_do_not_depend_on_the_sample_order(data, num_classes):
    n, d = data.draw(shapes)
    one = draw_regularizer(data, num_classes, d)
    other = ClassInterferenceRegularizer(
        num_classes, d, momentum=one.momentum, normalize=one.normalize
    )
    for _ in range(2):
        x, y = draw_batch(data, n, d, num_classes, non_finite=True)
        order = torch.randperm(n, generator=torch.Generator().manual_seed(data.draw(seeds)))
        one.interfere(x, y)
        other.interfere(x[order], y.long()[order])
        assert torch.equal(one.class_means, other.class_means)
        assert torch.equal(one.class_counts, other.class_counts)


@given(data=st.data(), num_classes=st.integers(2, 12))
def test_eval_mode_changes_nothing(data, num_classes):
    n, d = data.draw(shapes)
    regularizer = draw_regularizer(data, num_classes, d)
    regularizer.interfere(*draw_batch(data, n, d, num_classes))
    regularizer.eval()
    before = state_of(regularizer)
    x, y = draw_batch(data, n, d, num_classes, non_finite=True)
    assert regularizer.interfere(x, y) is x
    assert same_state(regularizer.state_dict(), before)


BASES = {
    "triplet": lambda d: losses.TripletMarginLoss(),
    "contrastive": lambda d: losses.ContrastiveLoss(),
    "multi-similarity": lambda d: losses.MultiSimilarityLoss(),
    "proxy": lambda d: losses.CosFaceLoss(12, d),
}


@given(data=st.data(), base=st.sampled_from(list(BASES)), num_classes=st.integers(2, 12))
def test_attached_loss_equals_the_loss_of_perturbed_embeddings(data, base, num_classes):
    n, d = data.draw(shapes)
    n = max(n, 1)
    regularizer = draw_regularizer(data, num_classes, d)
    alone = copy.deepcopy(regularizer)
    alone.generator = torch.Generator()
    alone.generator.set_state(regularizer.generator.get_state())
    loss_func = BASES[base](d)
    plain = copy.deepcopy(loss_func)
    regularizer.attach(loss_func)
    miner = miners.MultiSimilarityMiner() if data.draw(st.booleans()) else None
    for train in (True, True, False):
        loss_func.train(train)
        alone.train(train)
        x, y = draw_batch(data, n, d, num_classes, dtype=torch.float32, extreme=False)
        y = y.long()
        indices = miner(x, y) if miner else None
        torch.manual_seed(1)
        actual = loss_func(x, labels=y, indices_tuple=indices)
        torch.manual_seed(1)
        expected = plain(alone.interfere(x, y), y, indices)
        assert torch.equal(actual, expected) or (actual.isnan() and expected.isnan())
    regularizer.detach(loss_func)
    torch.manual_seed(1)
    detached = loss_func(x, y)
    torch.manual_seed(1)
    expected = plain(x, y)
    assert torch.equal(detached, expected) or (detached.isnan() and expected.isnan())


@pytest.mark.parametrize("attached", [False, True])
@given(data=st.data())
def test_refused_input_does_not_change_the_state(data, attached):
    (n, d), c = data.draw(small_shapes), 5
    regularizer = draw_regularizer(data, c, d)
    torch.manual_seed(data.draw(seeds))
    x, y = torch.randn(n, d), torch.randint(c, (n,))
    loss_func = regularizer.attach(losses.ContrastiveLoss()) if attached else regularizer
    call = loss_func if attached else regularizer.interfere
    call(x, y)
    invalid_labels = y.clone()
    invalid_labels[data.draw(st.integers(0, n - 1))] = data.draw(
        st.sampled_from([-1, c, 2**40, -(2**63), 2**63 - 1])
    )
    invalid_calls = {
        "label out of range": lambda: call(x, invalid_labels),
        "no labels": lambda: call(x, None),
        "float labels": lambda: call(x, y.float()),
        "fewer labels": lambda: call(x, y[1:]),
        "label columns": lambda: call(x, y[:, None]),
        "wide": lambda: call(torch.randn(n, d + 1), y),
        "vectors": lambda: call(x[:, 0], y),
        "images": lambda: call(x[:, :, None], y),
        "integers": lambda: call(x.long(), y),
        "complex": lambda: call(x.cfloat(), y),
    }
    for name, invalid_call in invalid_calls.items():
        assert_refused_without_change(loss_func, invalid_call, name)
