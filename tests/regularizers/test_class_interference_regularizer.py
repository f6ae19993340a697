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

from helpers.state import same_state, state_of
from pml_extras.functional import class_interference
from pml_extras.regularizers import ClassInterferenceRegularizer

C, D, N = 6, 4, 24


@pytest.fixture
def batch():
    return torch.randn(N, D), torch.arange(N) % C


def make_regularizer(**kwargs):
    return ClassInterferenceRegularizer(C, D, **kwargs)


def with_means(regularizer, batch):
    """The regularizer, after a batch that sets its class means."""
    regularizer.interfere(*batch)
    return regularizer


def test_the_first_batch_is_not_perturbed_and_sets_the_means(batch):
    x, labels = batch
    regularizer = make_regularizer(strength=0.4, normalize=False)
    assert torch.equal(regularizer.interfere(x, labels), x)
    expected = torch.stack([x[labels == c].mean(0) for c in range(C)])
    assert torch.allclose(regularizer.class_means, expected, atol=1e-6)
    assert torch.equal(regularizer.class_counts, torch.full((C,), N // C))


def test_means_are_updated_with_the_unperturbed_embeddings(batch):
    _, labels = batch
    regularizer = with_means(make_regularizer(strength=0.4, momentum=0.8), batch)
    before = regularizer.class_means.clone()
    y = torch.randn(N, D)
    regularizer.interfere(y, labels)
    batch_means = torch.stack([normalize(y)[labels == c].mean(0) for c in range(C)])
    assert torch.allclose(regularizer.class_means, 0.8 * before + 0.2 * batch_means, atol=1e-6)


def test_embeddings_are_perturbed_with_the_means_before_the_batch(batch):
    _, labels = batch
    regularizer = with_means(make_regularizer(generator=torch.Generator().manual_seed(1)), batch)
    before = copy.deepcopy(regularizer)
    y = torch.randn(N, D)
    expected = class_interference(
        y, labels, before.class_means, before.class_counts, generator=before.generator
    )
    assert torch.equal(regularizer.interfere(y, labels), expected)


def test_is_the_identity_in_eval_mode(batch):
    regularizer = with_means(make_regularizer(strength=0.4), batch).eval()
    before = state_of(regularizer)
    x = torch.randn(N, D)
    assert regularizer.interfere(x, batch[1]) is x
    assert same_state(state_of(regularizer), before)


def test_validation_under_no_grad_has_the_loss_of_clean_embeddings():
    x, labels = torch.eye(4).repeat(2, 1), torch.arange(4).repeat(2)
    regularizer = ClassInterferenceRegularizer(4, 4, strength=0.4)
    loss_func = regularizer.attach(TripletMarginLoss())
    loss_func(x, labels)
    assert loss_func(x, labels) > 0
    with torch.no_grad():
        assert loss_func(x, labels) == 0


def test_update_class_means_is_the_update_of_a_training_step(batch):
    trained, updated = make_regularizer(strength=0), make_regularizer().eval()
    trained.interfere(*batch)
    with torch.no_grad():
        updated.update_class_means(batch[0], batch[1].int())
    assert torch.equal(updated.class_means, trained.class_means)
    assert torch.equal(updated.class_counts, trained.class_counts)
    with pytest.raises(ValueError, match=rf"labels must lie in \[0, {C}\)"):
        updated.update_class_means(batch[0], batch[1] + C)
    assert torch.equal(updated.class_means, trained.class_means)


def test_is_the_identity_at_strength_zero_without_normalization(batch):
    regularizer = with_means(make_regularizer(strength=0, normalize=False), batch)
    x = torch.randn(N, D)
    assert torch.equal(regularizer.interfere(x, batch[1]), x)


def test_saved_generator_state_makes_runs_reproducible(batch):
    x, labels = batch
    original = with_means(
        make_regularizer(strength=0.3, generator=torch.Generator().manual_seed(7)), batch
    )
    loaded = make_regularizer(strength=0.3, generator=torch.Generator())
    loaded.load_state_dict(original.state_dict())
    copied = copy.deepcopy(original)
    expected = original.interfere(x, labels)
    assert torch.equal(loaded.interfere(x, labels), expected)
    assert torch.equal(copied.interfere(x, labels), expected)
    assert not torch.equal(original.interfere(x, labels), expected)


class TestAttach:
    def test_the_loss_gets_perturbed_embeddings(self, batch):
        x, labels = batch
        regularizer = with_means(
            make_regularizer(generator=torch.Generator().manual_seed(3)), batch
        )
        copied = copy.deepcopy(regularizer)
        loss_func = regularizer.attach(TripletMarginLoss())
        assert type(loss_func) is TripletMarginLoss
        expected = TripletMarginLoss()(copied.interfere(x, labels), labels)
        assert torch.equal(loss_func(x, labels), expected)

    def test_positional_and_keyword_arguments_are_supported(self, batch):
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
            losses.append(
                call(
                    with_means(make_regularizer(generator=generator), batch).attach(
                        ContrastiveLoss()
                    )
                )
            )
        assert all(torch.equal(loss, losses[0]) for loss in losses)
        assert losses[0] != ContrastiveLoss()(x, labels)

    def test_follows_the_mode_of_the_loss(self, batch):
        loss_func = with_means(make_regularizer(strength=0.4), batch).attach(ContrastiveLoss())
        assert loss_func.eval()(*batch) == ContrastiveLoss()(*batch)
        assert loss_func.train()(*batch) != ContrastiveLoss()(*batch)

    def test_means_are_in_the_state_dict_of_the_loss(self, batch):
        loss_func = with_means(make_regularizer(), batch).attach(ContrastiveLoss())
        resumed = make_regularizer().attach(ContrastiveLoss())
        resumed.load_state_dict(loss_func.state_dict())
        means = resumed.class_interference.class_means
        assert torch.equal(means, loss_func.class_interference.class_means)

    def test_a_deep_copy_is_independent(self, batch):
        loss_func = with_means(make_regularizer(), batch).attach(ContrastiveLoss())
        copied = copy.deepcopy(loss_func)
        before = loss_func.class_interference.class_means.clone()
        copied(torch.randn(N, D), batch[1])
        assert torch.equal(loss_func.class_interference.class_means, before)
        assert not torch.equal(copied.class_interference.class_means, before)
        assert copied.class_interference.detach(copied)(*batch) == ContrastiveLoss()(*batch)
        assert loss_func(*batch) != ContrastiveLoss()(*batch)

    def test_detach_restores_the_loss(self, batch):
        regularizer = with_means(make_regularizer(strength=0.4), batch)
        loss_func = ContrastiveLoss()
        keys = set(loss_func.state_dict())
        assert regularizer.detach(regularizer.attach(loss_func)) is loss_func
        assert loss_func(*batch) == ContrastiveLoss()(*batch)
        assert set(loss_func.state_dict()) == keys
        assert not loss_func._forward_pre_hooks
        assert not loss_func._forward_pre_hooks_with_kwargs
        assert not loss_func._forward_hooks
        with pytest.raises(ValueError, match="not attached"):
            regularizer.detach(loss_func)

    def test_proxies_are_not_perturbed(self, batch):
        x, labels = batch
        loss_func = ArcFaceLoss(C, D)
        proxies = loss_func.W.clone()
        regularizer = with_means(make_regularizer(), batch)
        regularizer.attach(loss_func)(x, labels)
        assert torch.equal(loss_func.W, proxies)

    def test_the_memory_of_cross_batch_memory_is_not_perturbed(self, batch):
        x, labels = batch
        loss_func = with_means(make_regularizer(strength=0.4), batch).attach(ContrastiveLoss())
        memory = CrossBatchMemory(loss_func, D, memory_size=N)
        loss = memory(x, labels)
        assert torch.equal(memory.embedding_memory, x)
        assert loss != CrossBatchMemory(ContrastiveLoss(), D, memory_size=N)(x, labels)

    def test_several_losses_can_share_one_regularizer(self, batch):
        losses = MultipleLosses([ContrastiveLoss(), TripletMarginLoss()])
        counts = (
            with_means(make_regularizer(), batch)
            .attach(losses)
            .class_interference.class_counts.clone()
        )
        losses(*batch)
        assert torch.equal(losses.class_interference.class_counts, 2 * counts)

    def test_a_batch_that_the_loss_rejects_does_not_change_the_means(self, batch):
        loss_func = with_means(make_regularizer(), batch).attach(ContrastiveLoss())
        before = loss_func.class_interference.class_means.clone()
        out_of_range = torch.tensor([N, N])
        with pytest.raises(IndexError):
            loss_func(torch.randn(N, D), batch[1], (out_of_range,) * 4)
        assert torch.equal(loss_func.class_interference.class_means, before)
        loss_func(torch.randn(N, D), batch[1])
        assert not torch.equal(loss_func.class_interference.class_means, before)

    def test_attaching_to_a_wrapper_or_twice_is_rejected(self, batch):
        with pytest.raises(TypeError, match="CrossBatchMemory wraps a loss: attach to that"):
            make_regularizer().attach(CrossBatchMemory(ContrastiveLoss(), D))
        with pytest.raises(ValueError, match="already has a class interference attached"):
            make_regularizer().attach(make_regularizer().attach(ContrastiveLoss()))


def test_the_error_as_embedding_regularizer_says_what_to_do(batch):
    loss_func = ContrastiveLoss(embedding_regularizer=make_regularizer())
    with pytest.raises(TypeError, match=r"call regularizer\.attach\(loss\) instead"):
        loss_func(*batch)


@pytest.mark.parametrize("label", [C, -1])
def test_a_rejected_batch_changes_nothing(batch, label):
    x, labels = batch
    regularizer = with_means(make_regularizer(generator=torch.Generator().manual_seed(0)), batch)
    before = state_of(regularizer)
    labels[5] = label
    with pytest.raises(ValueError, match=rf"\[0, {C}\), got {label} at index 5"):
        regularizer.interfere(x, labels)
    with pytest.raises(ValueError, match=r"shape \(batch_size, 4\)"):
        regularizer.interfere(x[:, :3], labels % C)
    with pytest.raises(ValueError, match=r"labels must have shape \(24,\), got \(23,\)"):
        regularizer.interfere(x, labels[1:] % C)
    with pytest.raises(ValueError, match="labels are required"):
        make_regularizer().attach(ContrastiveLoss())(x, indices_tuple=(torch.tensor([0]),) * 4)
    assert same_state(state_of(regularizer), before)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_classes", 1),
        ("embedding_size", 0),
        ("strength", 0.5),
        ("strength", -0.1),
        ("probability", 1.5),
        ("momentum", -1),
    ],
)
def test_invalid_hyperparameters_are_reported(name, value):
    with pytest.raises(ValueError, match=f"^{name} must .*, got {value!r}"):
        ClassInterferenceRegularizer(**{"num_classes": C, "embedding_size": D, name: value})


def test_stats_are_the_mean_shift_and_the_number_of_classes(batch):
    regularizer = with_means(
        make_regularizer(strength=0.4, normalize=False, collect_stats=True), batch
    )
    assert regularizer.avg_shift == 0
    assert regularizer.num_seen_classes == C
    x = torch.randn(N, D)
    shift = (regularizer.interfere(x, batch[1]) - x).norm(dim=1).mean()
    assert regularizer.avg_shift == pytest.approx(float(shift))


def test_an_empty_batch_changes_nothing(batch):
    regularizer = with_means(make_regularizer(), batch)
    before = regularizer.class_means.clone()
    assert regularizer.interfere(torch.empty(0, D), torch.empty(0).long()).shape == (0, D)
    assert torch.equal(regularizer.class_means, before)
