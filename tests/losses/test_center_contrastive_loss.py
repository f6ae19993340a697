from __future__ import annotations

import warnings
from functools import partial

import pytest
import torch
from pytorch_metric_learning.distances import CosineSimilarity, LpDistance
from pytorch_metric_learning.losses import CosFaceLoss, NormalizedSoftmaxLoss
from pytorch_metric_learning.miners import MultiSimilarityMiner
from pytorch_metric_learning.reducers import ClassWeightedReducer, DoNothingReducer
from pytorch_metric_learning.regularizers import LpRegularizer, RegularFaceRegularizer
from torch.nn.functional import normalize
from torch.utils.checkpoint import checkpoint

from helpers.state import same_state, state_of
from pml_extras.losses import CenterContrastiveLoss

C, D, N = 7, 5, 24


@pytest.fixture
def batch():
    return torch.randn(N, D), torch.randint(C, (N,))


def with_centers(loss_func, centers):
    """Copy centers, (C, D), to the proxies of a PML loss, (D, C)."""
    with torch.no_grad():
        loss_func.W.copy_(centers.T)
    return loss_func


def losses_with_gradients(ours, theirs, x, labels):
    for loss_func, weights in ((ours, ours.centers), (theirs, theirs.W)):
        x = x.detach().clone().requires_grad_()
        loss = loss_func(x, labels)
        loss.backward()
        yield loss.detach(), x.grad, weights.grad


@pytest.mark.parametrize(("scale", "margin"), [(16, 0.2), (64, 0.35), (1, 1.0)])
def test_without_the_center_term_equals_pml_cosface(batch, scale, margin):
    ours = CenterContrastiveLoss(
        C, D, scale=scale, margin=margin, center_weight=0, negative_classes="all"
    )
    theirs = with_centers(CosFaceLoss(C, D, margin=margin, scale=scale), ours.centers)
    (loss, dx, dc), (expected, expected_dx, expected_dw) = losses_with_gradients(
        ours, theirs, *batch
    )
    assert torch.allclose(loss, expected, rtol=1e-5)
    assert torch.allclose(dx, expected_dx, rtol=1e-4, atol=1e-6)
    assert torch.allclose(dc, expected_dw.T, rtol=1e-4, atol=1e-6)


def test_without_center_term_and_margin_equals_pml_normalized_softmax(batch):
    ours = CenterContrastiveLoss(C, D, scale=20, margin=0, center_weight=0, negative_classes="all")
    theirs = with_centers(
        NormalizedSoftmaxLoss(C, D, temperature=1 / 20, distance=CosineSimilarity()), ours.centers
    )
    (loss, dx, dc), (expected, expected_dx, expected_dw) = losses_with_gradients(
        ours, theirs, *batch
    )
    assert torch.allclose(loss, expected, rtol=1e-5)
    assert torch.allclose(dx, expected_dx, rtol=1e-4, atol=1e-6)
    assert torch.allclose(dc, expected_dw.T, rtol=1e-4, atol=1e-6)
    assert torch.allclose(ours.get_logits(batch[0]), theirs.get_logits(batch[0]), atol=1e-5)


def test_rescaling_embeddings_or_centers_does_not_change_the_loss(batch):
    x, labels = batch
    loss_func = CenterContrastiveLoss(C, D)
    expected = loss_func(x, labels)
    assert torch.allclose(loss_func(x * 100, labels), expected, rtol=1e-5)
    with torch.no_grad():
        loss_func.centers *= torch.rand(C, 1) + 0.01
    assert torch.allclose(loss_func(x, labels), expected, rtol=1e-5)


def test_training_classifies_all_samples(batch):
    x, labels = batch
    loss_func = CenterContrastiveLoss(C, D)
    x.requires_grad_()
    optimizer = torch.optim.Adam([x, *loss_func.parameters()], lr=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        loss_func(x, labels).backward()
        optimizer.step()
    assert torch.equal(loss_func.get_logits(x).argmax(1), labels)


def test_miner_tuples_weight_the_samples(batch):
    x, labels = batch
    loss_func = CenterContrastiveLoss(C, D, reducer=DoNothingReducer())
    unweighted = loss_func(x, labels)["loss"]["losses"]
    anchors, others = torch.tensor([3, 3, 4]), torch.tensor([4, 5, 5])
    weighted = loss_func(x, labels, (anchors, others, others))["loss"]["losses"]
    weights = torch.zeros(N)
    weights[[3, 4, 5]] = torch.tensor([2 / 4, 3 / 4, 4 / 4])
    assert torch.allclose(weighted, unweighted * weights)
    loss_func(x, labels, MultiSimilarityMiner()(x, labels))


def test_weight_regularizer_acts_on_the_centers(batch):
    plain = CenterContrastiveLoss(C, D)
    regularized = CenterContrastiveLoss(
        C, D, weight_regularizer=LpRegularizer(), weight_reg_weight=3
    )
    regularized.load_state_dict(plain.state_dict())
    penalty = 3 * plain.centers.norm(dim=1).mean()
    assert torch.allclose(regularized(*batch), plain(*batch) + penalty)
    CenterContrastiveLoss(C, D, weight_regularizer=RegularFaceRegularizer())(*batch).backward()
    with pytest.raises(ValueError, match='weight_regularizer needs center_update="gradient"'):
        CenterContrastiveLoss(C, D, center_update="ema", weight_regularizer=LpRegularizer())


def test_class_weighted_reducer_weights_the_samples(batch):
    x, labels = batch
    weights = torch.rand(C)
    plain = CenterContrastiveLoss(C, D, reducer=DoNothingReducer())
    weighted = CenterContrastiveLoss(C, D, reducer=ClassWeightedReducer(weights))
    weighted.load_state_dict(plain.state_dict())
    expected = (plain(x, labels)["loss"]["losses"] * weights[labels]).mean()
    assert torch.allclose(weighted(x, labels), expected)


@pytest.mark.parametrize(
    ("label", "index"), [(C, 4), (-1, 0), (1 << 40, N - 1)], ids=["C", "negative", "huge"]
)
@pytest.mark.parametrize("center_update", ["gradient", "ema"])
def test_a_label_out_of_range_is_reported_and_changes_nothing(batch, label, index, center_update):
    x, labels = batch
    labels[index] = label
    loss_func = CenterContrastiveLoss(C, D, center_update=center_update)
    before = state_of(loss_func)
    with pytest.raises(ValueError, match=rf"\[0, {C}\), got {label} at index {index}$"):
        loss_func(x, labels)
    assert same_state(state_of(loss_func), before)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_classes", 0),
        ("embedding_size", 0),
        ("scale", 0),
        ("scale", float("nan")),
        ("margin", -0.1),
        ("center_weight", -1),
        ("momentum", 1.1),
        ("label_smoothing", 1),
        ("center_update", "sometimes"),
        ("negative_classes", "some"),
    ],
)
def test_invalid_hyperparameters_are_reported(name, value):
    with pytest.raises(ValueError, match=f"^{name} must .*, got {value!r}"):
        CenterContrastiveLoss(**{"num_classes": C, "embedding_size": D, name: value})


def test_invalid_input_is_rejected(batch):
    x, labels = batch
    loss_func = CenterContrastiveLoss(C, D)
    with pytest.raises(ValueError, match=r"shape \(batch_size, 5\), got \(24, 4\)"):
        loss_func(x[:, :4], labels)
    with pytest.raises(ValueError, match="labels are required"):
        loss_func(x)
    with pytest.raises(ValueError, match=r"labels must be integers, got torch\.float32"):
        loss_func(x, labels.float())
    with pytest.raises(ValueError, match="ref_emb is not supported"):
        loss_func(x, labels, ref_emb=x.clone(), ref_labels=labels)
    with pytest.raises(AssertionError, match="CosineSimilarity"):
        CenterContrastiveLoss(C, D, distance=LpDistance())


def test_autocast_keeps_the_centers_in_float32(batch):
    loss_func = CenterContrastiveLoss(C, D)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_func(batch[0].bfloat16(), batch[1])
    assert loss_func.centers.dtype == torch.float32
    assert loss.dtype == torch.float32


class TestForgottenOptimizerWarning:
    def train(self, loss_func, optimizer, batch, steps=150):
        for _ in range(steps):
            loss = loss_func(*batch)
            if optimizer is not None:
                optimizer.zero_grad()
            loss.backward()
            if optimizer is not None:
                optimizer.step()

    def test_warns_once_if_the_optimizer_was_forgotten(self, batch):
        loss_func = CenterContrastiveLoss(C, D)
        message = "have not moved in 100 training steps: give loss.parameters"
        with pytest.warns(UserWarning, match=message) as record:
            self.train(loss_func, None, batch, steps=300)
        assert len(record) == 1

    def test_warns_although_the_gradients_are_removed(self, batch):
        loss_func = CenterContrastiveLoss(C, D)

        def train():
            for _ in range(110):
                loss_func.zero_grad()
                loss_func(*batch).backward()

        with pytest.warns(UserWarning, match="have not moved"):
            train()

    @pytest.mark.parametrize("foreach", [False, True])
    @pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
    def test_does_not_warn_if_an_optimizer_steps(self, batch, optimizer, foreach):
        loss_func = CenterContrastiveLoss(C, D)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            self.train(loss_func, optimizer(loss_func.parameters(), 0.0, foreach=foreach), batch)

    def test_does_not_warn_while_gradients_accumulate(self, batch):
        loss_func = CenterContrastiveLoss(C, D)
        optimizer = torch.optim.SGD(loss_func.parameters(), 0.1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            self.train(loss_func, None, batch, steps=300)  # micro-batches before the first step
            optimizer.step()

    def test_warns_if_another_loss_has_the_optimizer(self, batch):
        loss_func, other = CenterContrastiveLoss(C, D), CenterContrastiveLoss(C, D)
        optimizer = torch.optim.SGD(other.parameters(), 0.1)
        with pytest.warns(UserWarning, match="have not moved"):
            self.train(loss_func, optimizer, batch)

    def test_does_not_warn_if_the_centers_are_moved_by_hand(self, batch):
        loss_func = CenterContrastiveLoss(C, D)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(150):
                loss_func(*batch).backward()
                with torch.no_grad():
                    loss_func.centers -= 0.1 * loss_func.centers.grad

    def test_does_not_warn_if_a_fused_optimizer_steps(self, batch):
        # A fused optimizer does not increment the version counters of the parameters.
        loss_func = CenterContrastiveLoss(C, D)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer = torch.optim.Adam(loss_func.parameters(), 0.1, fused=True)
            self.train(loss_func, optimizer, batch)

    def test_does_not_warn_if_the_centers_need_no_optimizer(self, batch):
        x = batch[0].requires_grad_()
        frozen = CenterContrastiveLoss(C, D).requires_grad_(False)
        ema = CenterContrastiveLoss(C, D, center_update="ema")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            self.train(frozen, None, (x, batch[1]))
            self.train(ema, None, (x, batch[1]))
            self.train(CenterContrastiveLoss(C, D).eval(), None, (x, batch[1]))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
@pytest.mark.parametrize("center_update", ["gradient", "ema"])
def test_negatives_of_the_batch_equal_a_loss_with_these_classes_only(
    center_update, label_smoothing
):
    options = {
        "center_update": center_update,
        "label_smoothing": label_smoothing,
        "weight_init_func": lambda weight: torch.nn.init.normal_(weight),
    }
    present = torch.tensor([1, 4, 7])
    batch_loss = CenterContrastiveLoss(9, D, negative_classes="batch", **options).double()
    small_loss = CenterContrastiveLoss(3, D, negative_classes="all", **options).double()
    with torch.no_grad():
        small_loss.centers.copy_(batch_loss.centers[present])
    small_labels = torch.randint(3, (2, N))
    for labels in small_labels:
        x = torch.randn(N, D).double()
        small_x, batch_x = (x.clone().requires_grad_() for _ in range(2))
        expected, actual = small_loss(small_x, labels), batch_loss(batch_x, present[labels])
        assert torch.allclose(actual, expected)
        expected.backward()
        actual.backward()
        assert torch.allclose(batch_x.grad, small_x.grad)
    if center_update == "gradient":
        assert torch.allclose(batch_loss.centers.grad[present], small_loss.centers.grad)
        assert batch_loss.centers.grad.count_nonzero() == 3 * D
    else:
        assert torch.equal(batch_loss.centers[present], small_loss.centers)


def test_unseen_ema_classes_of_the_batch_are_no_negatives():
    x, labels = torch.randn(6, D), torch.tensor([0, 0, 1, 1, 2, 2])
    batch_loss, all_loss = (
        CenterContrastiveLoss(C, D, center_update="ema", negative_classes=negatives)
        for negatives in ("batch", "all")
    )
    for loss_func in (batch_loss, all_loss):
        loss_func.update_centers(x[:4], labels[:4])
        loss_func.eval()
    assert torch.allclose(batch_loss(x, labels), all_loss(x, labels))


@pytest.mark.parametrize("center_update", ["gradient", "ema"])
def test_an_empty_batch_has_zero_loss_and_changes_nothing(center_update):
    loss_func = CenterContrastiveLoss(C, D, center_update=center_update)
    before = loss_func.centers.clone()
    x = torch.empty(0, D, requires_grad=True)
    loss = loss_func(x, torch.empty(0, dtype=torch.long))
    loss.backward()
    assert loss == 0
    assert torch.equal(loss_func.centers, before)


class TestEMA:
    def make_loss(self, **kwargs):
        return CenterContrastiveLoss(C, D, center_update="ema", **kwargs)

    def test_activation_checkpointing_moves_the_centers_once(self, batch):
        x, labels = batch
        gradients, states = [], []
        for checkpoints in (False, True):
            loss_func, leaf = self.make_loss(), x.detach().clone().requires_grad_()
            call = partial(checkpoint, loss_func, use_reentrant=False) if checkpoints else loss_func
            call(leaf, labels).backward()
            call(leaf, labels).backward()
            gradients.append(leaf.grad)
            states.append(state_of(loss_func))
        assert torch.equal(*gradients)
        assert same_state(*states)

    def test_centers_are_normalized_moving_averages(self, batch):
        x, labels = batch
        loss_func = self.make_loss(momentum=0.7)
        expected = torch.zeros(C, D)
        for _ in range(3):
            x = torch.randn(N, D)
            for c in labels.unique():
                mean = normalize(normalize(x[labels == c]).mean(0), dim=0)
                ema = 0.7 * expected[c] + 0.3 * mean if expected[c].any() else mean
                expected[c] = normalize(ema, dim=0)
            loss_func(x, labels)
            assert torch.allclose(loss_func.centers, expected, atol=1e-6)
        assert torch.equal(loss_func.class_counts, 3 * torch.bincount(labels, minlength=C))

    def test_the_loss_uses_the_updated_centers(self, batch):
        x, labels = batch
        ema = self.make_loss()
        loss = ema(x, labels)
        gradient = CenterContrastiveLoss(C, D)
        with torch.no_grad():
            gradient.centers.copy_(ema.centers)
        if (ema.class_counts > 0).all():
            assert torch.allclose(loss, gradient(x, labels))
        assert ema.eval()(x, labels) == loss

    def test_classes_without_a_center_take_no_part(self):
        x, labels = torch.randn(6, D), torch.tensor([1, 1, 4, 4, 5, 5])
        expected = CenterContrastiveLoss(3, D, center_update="ema")
        actual = self.make_loss()
        remapped_labels = torch.tensor([0, 0, 1, 1, 2, 2])
        assert torch.allclose(actual(x, labels), expected(x, remapped_labels), rtol=1e-6)
        logits = actual.get_logits(x)
        assert torch.isneginf(logits[:, [0, 2, 3, 6]]).all()
        assert logits[:, [1, 4, 5]].isfinite().all()

    def test_has_no_parameters_and_a_gradient_for_the_embeddings(self, batch):
        x, labels = batch
        loss_func = self.make_loss()
        assert list(loss_func.parameters()) == []
        x.requires_grad_()
        loss_func(x, labels).backward()
        assert x.grad.abs().sum() > 0

    def test_centers_do_not_change_in_eval_mode(self, batch):
        loss_func = self.make_loss()
        loss_func(*batch)
        before = loss_func.centers.clone()
        loss_func.eval()(torch.randn(N, D), batch[1])
        assert torch.equal(loss_func.centers, before)

    def test_update_centers_is_the_update_of_a_training_step(self, batch):
        trained, updated = self.make_loss(), self.make_loss().eval()
        trained(*batch)
        with torch.no_grad():
            updated.update_centers(batch[0].half().float(), batch[1].int())
            trained_again = self.make_loss()
            trained_again.update_centers(*batch)
        assert torch.equal(trained_again.centers, trained.centers)
        assert torch.equal(updated.class_counts, trained.class_counts)
        assert torch.allclose(updated.centers, trained.centers, atol=1e-3)

    def test_update_centers_refuses_wrong_input(self, batch):
        x, labels = batch
        loss_func = self.make_loss()
        before = state_of(loss_func)
        for message, arguments in {
            r"labels must lie in \[0, 7\)": (x, labels + C),
            "labels are required": (x, None),
            r"labels must have shape \(24,\)": (x, labels[1:]),
            r"shape \(batch_size, 5\)": (x[:, 1:], labels),
        }.items():
            with pytest.raises(ValueError, match=message):
                loss_func.update_centers(*arguments)
        assert same_state(state_of(loss_func), before)
        with pytest.raises(ValueError, match='center_update must be "ema" to update'):
            CenterContrastiveLoss(C, D).update_centers(x, labels)

    def test_embeddings_that_are_not_finite_do_not_change_the_centers(self, batch):
        x, labels = batch
        loss_func = self.make_loss()
        loss_func(x, labels)
        before = loss_func.centers.clone()
        loss_func(torch.full((2, D), float("nan")), labels[:2])
        assert torch.equal(loss_func.centers, before)


def test_ema_losses_of_two_batches_support_one_backward():
    """Uses more logits than MAX_REFERENCE_LOGITS, so the chunked implementation runs."""
    loss_func = CenterContrastiveLoss(num_classes=2000, embedding_size=8, center_update="ema")
    labels = torch.randint(2000, (64,))
    x, y = (torch.randn(64, 8, requires_grad=True) for _ in range(2))
    loss_func(x, labels).backward()
    expected = x.grad.clone()
    loss_func.centers.zero_(), loss_func.class_counts.zero_()
    x.grad = None
    (loss_func(x, labels) + loss_func(y, labels)).backward()
    assert torch.allclose(x.grad, expected)


class TestAddClasses:
    @pytest.mark.parametrize(
        "make_optimizer",
        [
            lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True),
            lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
            lambda p: torch.optim.SGD(p, lr=0.1),
        ],
        ids=["Adam", "SGD with momentum", "SGD"],
    )
    def test_old_centers_go_on_with_their_optimizer_state(self, batch, make_optimizer):
        def train(loss_func, optimizer, steps):
            for _ in range(steps):
                optimizer.zero_grad()
                loss_func(*batch).backward()
                optimizer.step()

        # Expected: a loss with all classes from the start, and gradients for the old ones only.
        expected, grown = CenterContrastiveLoss(C + 2, D), CenterContrastiveLoss(C, D)
        with torch.no_grad():
            expected.centers[:C] = grown.centers
        optimizers = [make_optimizer(f.parameters()) for f in (expected, grown)]
        for f, o in zip((expected, grown), optimizers, strict=True):
            f.centers.grad = torch.ones_like(f.centers)
            f.centers.grad[C:] = 0
            o.step()
        grown.add_classes(2, optimizers[1])
        assert grown.centers.shape == (C + 2, D)
        with torch.no_grad():
            grown.centers[C:] = expected.centers[C:]
        for f, o in zip((expected, grown), optimizers, strict=True):
            train(f, o, 3)
        assert torch.allclose(grown.centers, expected.centers, atol=1e-6)

    def test_new_classes_are_trained(self, batch):
        x, labels = batch
        loss_func = CenterContrastiveLoss(C, D)
        with pytest.raises(ValueError, match=rf"\[0, {C}\)"):
            loss_func(x, labels + 1)
        old = loss_func.centers.detach().clone()
        loss_func.add_classes(1)
        assert torch.equal(loss_func.centers[:C], old)
        assert loss_func.centers[C].norm() > 0
        loss_func(x, labels + 1).backward()
        assert loss_func.centers.grad[C].norm() > 0
        assert loss_func.get_logits(x).shape == (N, C + 1)
        assert "num_classes=8" in repr(loss_func)

    def test_a_loop_that_keeps_the_last_loss_goes_on(self, batch):
        x, labels = batch
        loss_func = CenterContrastiveLoss(C, D)
        optimizer = torch.optim.Adam(loss_func.parameters(), 0.1)
        for _ in range(2):
            optimizer.zero_grad()
            loss = loss_func(x, labels)  # keeps the graph, also across the next line
            loss.backward()
            optimizer.step()
            before = loss_func.centers.detach().clone()
            loss_func.add_classes(1, optimizer)
            optimizer.zero_grad()
        loss_func(x, labels).backward()
        optimizer.step()
        assert not torch.allclose(loss_func.centers[:-1], before)
        with pytest.raises(ValueError, match="does not have the centers"):
            loss_func.add_classes(1, torch.optim.SGD(CenterContrastiveLoss(C, D).parameters()))

    def test_classes_added_in_inference_mode_are_trained(self, batch):
        for mode in ("gradient", "ema"):
            loss_func = CenterContrastiveLoss(C, D, center_update=mode)
            with torch.inference_mode():
                loss_func.add_classes(1)
            loss_func(batch[0].requires_grad_(), batch[1]).backward()

    def test_ema_centers_and_counts_stay(self, batch):
        x, labels = batch
        loss_func = CenterContrastiveLoss(C, D, center_update="ema")
        loss_func(x, labels)
        old = state_of(loss_func)
        loss_func.add_classes(3)
        assert torch.equal(loss_func.centers[:C], old["centers"])
        assert torch.equal(loss_func.class_counts[:C], old["class_counts"])
        assert loss_func.class_counts[C:].sum() == 0
        loss_func(x[:1], torch.tensor([C + 2]))
        assert torch.allclose(loss_func.centers[C + 2], normalize(x[0], dim=0))
        assert set(loss_func.state_dict()) == {"centers", "class_counts"}

    def test_an_unknown_optimizer_state_is_refused_and_nothing_changes(self, batch):
        loss_func = CenterContrastiveLoss(C, D)
        optimizer = torch.optim.SGD(loss_func.parameters(), 0.1)
        optimizer.state[loss_func.centers] = {"row": torch.zeros(C), "step": torch.tensor(1)}
        before = state_of(loss_func)
        with pytest.raises(ValueError, match=r"state row has shape \(7,\)"):
            loss_func.add_classes(1, optimizer)
        with pytest.raises(ValueError, match="number must be a whole number"):
            loss_func.add_classes(0)
        assert same_state(state_of(loss_func), before)
        assert loss_func.num_classes == C
