from __future__ import annotations

import copy

import pytest
import torch
from pytorch_metric_learning.losses import (
    ArcFaceLoss,
    ContrastiveLoss,
    CrossBatchMemory,
    MultipleLosses,
    TripletMarginLoss,
)
from torch.nn.functional import normalize

from pml_extras.functional import class_interference
from pml_extras.regularizers import ClassInterferenceRegularizer

C, D, N = 6, 4, 24


@pytest.fixture
def batch():
    return torch.randn(N, D), torch.arange(N) % C


def make(**kwargs):
    return ClassInterferenceRegularizer(C, D, **kwargs)


def warm(regularizer, batch):
    """A regularizer that has seen all classes."""
    regularizer.interfere(*batch)
    return regularizer


def test_first_batch_stays_clean_and_sets_the_means(batch):
    x, labels = batch
    regularizer = make(strength=0.4, normalize=False)
    assert torch.equal(regularizer.interfere(x, labels), x)
    expected = torch.stack([x[labels == c].mean(0) for c in range(C)])
    assert torch.allclose(regularizer.class_means, expected, atol=1e-6)
    assert torch.equal(regularizer.class_counts, torch.full((C,), N // C))


def test_means_move_with_the_clean_embeddings(batch):
    _, labels = batch
    regularizer = warm(make(strength=0.4, momentum=0.8), batch)
    before = regularizer.class_means.clone()
    y = torch.randn(N, D)
    regularizer.interfere(y, labels)
    batch_means = torch.stack([normalize(y)[labels == c].mean(0) for c in range(C)])
    assert torch.allclose(regularizer.class_means, 0.8 * before + 0.2 * batch_means, atol=1e-6)


def test_embeddings_move_by_the_means_before_the_batch(batch):
    _, labels = batch
    regularizer = warm(make(generator=torch.Generator().manual_seed(1)), batch)
    state = copy.deepcopy(regularizer)
    y = torch.randn(N, D)
    expected = class_interference(
        y, labels, state.class_means, state.class_counts, generator=state.generator
    )
    assert torch.equal(regularizer.interfere(y, labels), expected)


def test_identity_in_eval_mode(batch):
    regularizer = warm(make(strength=0.4), batch).eval()
    state = copy.deepcopy(regularizer.state_dict())
    x = torch.randn(N, D)
    assert regularizer.interfere(x, batch[1]) is x
    assert all(torch.equal(state[k], regularizer.state_dict()[k]) for k in ("class_means",))


def test_identity_at_strength_zero_without_normalisation(batch):
    regularizer = warm(make(strength=0, normalize=False), batch)
    x = torch.randn(N, D)
    assert torch.equal(regularizer.interfere(x, batch[1]), x)


def test_generator_and_its_state_make_runs_repeatable(batch):
    x, labels = batch
    a = warm(make(strength=0.3, generator=torch.Generator().manual_seed(7)), batch)
    b = make(strength=0.3, generator=torch.Generator())
    b.load_state_dict(a.state_dict())
    copied = copy.deepcopy(a)
    expected = a.interfere(x, labels)
    assert torch.equal(b.interfere(x, labels), expected)
    assert torch.equal(copied.interfere(x, labels), expected)
    assert not torch.equal(a.interfere(x, labels), expected)


class TestAttach:
    def test_the_loss_sees_interfered_embeddings(self, batch):
        x, labels = batch
        regularizer = warm(make(generator=torch.Generator().manual_seed(3)), batch)
        other = copy.deepcopy(regularizer)
        loss_func = regularizer.attach(TripletMarginLoss())
        assert type(loss_func) is TripletMarginLoss
        expected = TripletMarginLoss()(other.interfere(x, labels), labels)
        assert torch.equal(loss_func(x, labels), expected)

    def test_all_ways_of_calling(self, batch):
        x, labels = batch
        calls = [
            lambda f: f(x, labels),
            lambda f: f(x, labels=labels),
            lambda f: f(embeddings=x, labels=labels),
            lambda f: f(x, labels, None, None, None),
        ]
        losses = []
        for call in calls:
            generator = torch.Generator().manual_seed(3)
            losses.append(call(warm(make(generator=generator), batch).attach(ContrastiveLoss())))
        assert all(torch.equal(loss, losses[0]) for loss in losses)
        assert losses[0] != ContrastiveLoss()(x, labels)

    def test_follows_the_losss_mode(self, batch):
        loss_func = warm(make(strength=0.4), batch).attach(ContrastiveLoss())
        assert loss_func.eval()(*batch) == ContrastiveLoss()(*batch)
        assert loss_func.train()(*batch) != ContrastiveLoss()(*batch)

    def test_means_travel_in_the_losss_state_dict(self, batch):
        loss_func = warm(make(), batch).attach(ContrastiveLoss())
        resumed = make().attach(ContrastiveLoss())
        resumed.load_state_dict(loss_func.state_dict())
        means = resumed.class_interference.class_means
        assert torch.equal(means, loss_func.class_interference.class_means)

    def test_a_deep_copy_is_independent(self, batch):
        loss_func = warm(make(), batch).attach(ContrastiveLoss())
        copied = copy.deepcopy(loss_func)
        before = loss_func.class_interference.class_means.clone()
        copied(torch.randn(N, D), batch[1])
        assert torch.equal(loss_func.class_interference.class_means, before)
        assert not torch.equal(copied.class_interference.class_means, before)
        assert copied.class_interference.detach(copied)(*batch) == ContrastiveLoss()(*batch)
        assert loss_func(*batch) != ContrastiveLoss()(*batch)

    def test_detach_undoes_it(self, batch):
        regularizer = warm(make(strength=0.4), batch)
        loss_func = ContrastiveLoss()
        untouched = set(loss_func.state_dict())
        assert regularizer.detach(regularizer.attach(loss_func)) is loss_func
        assert loss_func(*batch) == ContrastiveLoss()(*batch)
        assert set(loss_func.state_dict()) == untouched
        assert not loss_func._forward_pre_hooks
        assert not loss_func._forward_pre_hooks_with_kwargs
        assert not loss_func._forward_hooks
        with pytest.raises(ValueError, match="not attached"):
            regularizer.detach(loss_func)

    def test_proxies_stay_clean(self, batch):
        x, labels = batch
        loss_func = ArcFaceLoss(C, D)
        proxies = loss_func.W.clone()
        regularizer = warm(make(), batch)
        regularizer.attach(loss_func)(x, labels)
        assert torch.equal(loss_func.W, proxies)

    def test_memory_of_a_cross_batch_memory_stays_clean(self, batch):
        x, labels = batch
        loss_func = warm(make(strength=0.4), batch).attach(ContrastiveLoss())
        memory = CrossBatchMemory(loss_func, D, memory_size=N)
        loss = memory(x, labels)
        assert torch.equal(memory.embedding_memory, x)
        assert loss != CrossBatchMemory(ContrastiveLoss(), D, memory_size=N)(x, labels)

    def test_several_losses_can_share_one_interference(self, batch):
        losses = MultipleLosses([ContrastiveLoss(), TripletMarginLoss()])
        counts = warm(make(), batch).attach(losses).class_interference.class_counts.clone()
        losses(*batch)
        assert torch.equal(losses.class_interference.class_counts, 2 * counts)

    def test_a_batch_that_the_loss_refuses_is_not_learnt_from(self, batch):
        loss_func = warm(make(), batch).attach(ContrastiveLoss())
        before = loss_func.class_interference.class_means.clone()
        far = torch.tensor([N, N])
        with pytest.raises(IndexError):
            loss_func(torch.randn(N, D), batch[1], (far, far, far, far))
        assert torch.equal(loss_func.class_interference.class_means, before)
        loss_func(torch.randn(N, D), batch[1])
        assert not torch.equal(loss_func.class_interference.class_means, before)

    def test_wrappers_and_doubles_are_refused(self, batch):
        with pytest.raises(TypeError, match="CrossBatchMemory wraps a loss: attach to that"):
            make().attach(CrossBatchMemory(ContrastiveLoss(), D))
        with pytest.raises(ValueError, match="already has a class interference attached"):
            make().attach(make().attach(ContrastiveLoss()))


def test_the_regularizer_slot_says_what_to_do(batch):
    loss_func = ContrastiveLoss(embedding_regularizer=make())
    with pytest.raises(TypeError, match=r"call regularizer\.attach\(loss\) instead"):
        loss_func(*batch)


@pytest.mark.parametrize("label", [C, -1])
def test_a_refused_batch_changes_nothing(batch, label):
    x, labels = batch
    regularizer = warm(make(generator=torch.Generator().manual_seed(0)), batch)
    state = copy.deepcopy(regularizer.state_dict())
    labels[5] = label
    with pytest.raises(ValueError, match=rf"\[0, {C}\), got {label} at index 5"):
        regularizer.interfere(x, labels)
    with pytest.raises(ValueError, match=r"shape \(batch_size, 4\)"):
        regularizer.interfere(x[:, :3], labels % C)
    with pytest.raises(ValueError, match=r"labels must have shape \(24,\), got \(23,\)"):
        regularizer.interfere(x, labels[1:] % C)
    with pytest.raises(ValueError, match="labels are required"):
        make().attach(ContrastiveLoss())(x, indices_tuple=(torch.tensor([0]),) * 4)
    assert all(torch.equal(v, state[k]) for k, v in regularizer.state_dict().items())


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("num_classes", 1),
        ("embedding_size", 0),
        ("strength", 0.5),
        ("strength", -0.1),
        ("probability", 1.5),
        ("momentum", -1),
    ],
)
def test_bad_settings_are_named(setting, value):
    with pytest.raises(ValueError, match=f"^{setting} must .*, got {value!r}"):
        ClassInterferenceRegularizer(**{"num_classes": C, "embedding_size": D, setting: value})


def test_stats(batch):
    regularizer = warm(make(strength=0.4, normalize=False, collect_stats=True), batch)
    assert regularizer.avg_shift == 0
    assert regularizer.num_seen_classes == C
    x = torch.randn(N, D)
    shift = (regularizer.interfere(x, batch[1]) - x).norm(dim=1).mean()
    assert regularizer.avg_shift == pytest.approx(float(shift))


def test_an_empty_batch_stays_empty(batch):
    regularizer = warm(make(), batch)
    before = regularizer.class_means.clone()
    assert regularizer.interfere(torch.empty(0, D), torch.empty(0).long()).shape == (0, D)
    assert torch.equal(regularizer.class_means, before)
