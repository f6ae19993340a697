from __future__ import annotations

import copy
import functools
import pickle

import numpy as np
import pytest
import torch
from pytorch_metric_learning.losses import (
    ArcFaceLoss,
    ContrastiveLoss,
    CrossBatchMemory,
    MultipleLosses,
    TripletMarginLoss,
)
from pytorch_metric_learning.miners import BatchEasyHardMiner, MultiSimilarityMiner
from pytorch_metric_learning.testers import GlobalEmbeddingSpaceTester
from pytorch_metric_learning.trainers import MetricLossOnly, TrainWithClassifier
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from torch import nn

from helpers.state import same_state, state_of
from pml_extras.distillation import EMATeacher, SelfDistillation, SnapshotTeacher
from pml_extras.losses import CenterContrastiveLoss, ListwiseDistillationLoss
from pml_extras.regularizers import ClassInterferenceRegularizer

C, D = 4, 3
TEACHERS = {"snapshot": SnapshotTeacher, "ema": functools.partial(EMATeacher, decay=0.5)}


def make_networks():
    torch.manual_seed(0)
    # With batch norm and dropout, a teacher in training mode gives wrong results.
    trunk = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.ReLU())
    return trunk, nn.Linear(8, D)


def batches(num_batches, size=12):
    generator = torch.Generator().manual_seed(1)
    for _ in range(num_batches):
        yield torch.randn(size, 5, generator=generator), torch.arange(size) % C


class Run:
    """A hand-written training loop."""

    def __init__(self, teacher="snapshot", alpha=50.0, num_epochs=4, collect_stats=True, loss=None):
        self.trunk, self.embedder = make_networks()
        self.teacher = TEACHERS[teacher](self.trunk, self.embedder)
        self.loss = SelfDistillation(
            loss or ContrastiveLoss(),
            self.teacher,
            num_epochs,
            alpha=alpha,
            collect_stats=collect_stats,
        )
        self.optimizer = torch.optim.Adam(self.modules().parameters(), lr=0.01)

    def modules(self):
        return nn.ModuleList([self.trunk, self.embedder, self.loss])

    def train_epoch(self, steps=3):
        torch.manual_seed(100 + self.loss.epoch)
        for x, labels in batches(steps):
            self.optimizer.zero_grad()
            loss = self.loss(self.embedder(self.trunk(x)), labels)
            loss.backward()
            self.optimizer.step()
        return loss

    def trunk_state(self):
        return torch.cat([p.detach().flatten() for p in self.trunk.state_dict().values()])


@pytest.mark.parametrize("teacher", TEACHERS)
def test_loss_is_the_base_loss_plus_weighted_distillation(teacher):
    run = Run(teacher, alpha=20.0, num_epochs=4)
    run.train_epoch()
    run.loss.end_epoch()
    run.train_epoch()
    run.loss.end_epoch()
    x, labels = next(batches(1))
    f = run.embedder(run.trunk(x))
    trunk, embedder = run.teacher.network.children()
    expected = ListwiseDistillationLoss()(f, ref_emb=embedder(trunk(x)))
    loss = run.loss(f, labels)
    assert run.loss.weight == 20.0 * 2 / 4
    assert torch.allclose(loss, ContrastiveLoss()(f, labels) + 10.0 * expected)
    assert expected > 0
    assert run.loss.distillation_weight == 10.0
    assert run.loss.distillation_loss == pytest.approx(expected.item())
    assert run.loss.base_loss == pytest.approx(ContrastiveLoss()(f, labels).item())


def test_adds_nothing_in_the_first_epoch_and_skips_the_teacher():
    run = Run(alpha=1e6)
    run.teacher.embed = None  # a call would raise
    x, labels = next(batches(1))
    f = run.embedder(run.trunk(x))
    assert run.loss(f, labels) == ContrastiveLoss()(f, labels)


def test_adds_nothing_when_student_and_teacher_coincide():
    run = Run(alpha=1e6, num_epochs=1)
    run.loss.end_epoch()  # the teacher becomes the network
    x, labels = next(batches(1))
    run.trunk.eval()
    f = run.embedder(run.trunk(x))
    assert run.loss(f, labels) == ContrastiveLoss()(f, labels)


def test_snapshot_is_the_network_at_the_end_of_the_epoch():
    run = Run()
    run.train_epoch()
    run.loss.end_epoch()
    at_end = state_of(run.trunk)
    run.train_epoch()
    teacher_trunk, _ = run.teacher.network.children()
    assert same_state(state_of(teacher_trunk), at_end)
    assert not torch.equal(run.trunk.state_dict()["0.weight"], at_end["0.weight"])


def test_ema_averages_the_weights_at_each_batch():
    run = Run("ema")
    expected = None
    for x, labels in batches(4):
        weight = run.trunk[0].weight.detach().clone()
        expected = weight if expected is None else 0.5 * expected + 0.5 * weight
        run.loss(run.embedder(run.trunk(x)), labels).backward()
        run.optimizer.step()
    teacher_trunk, _ = run.teacher.network.children()
    assert torch.allclose(teacher_trunk[0].weight, expected, atol=1e-7)


@pytest.mark.parametrize("teacher", TEACHERS)
def test_the_teacher_stays_in_eval_mode_and_is_no_submodule(teacher):
    run = Run(teacher)
    run.train_epoch()
    run.loss.end_epoch()
    run.modules().train()
    run.train_epoch()
    assert not any(m.training for m in run.teacher.network.modules())
    assert not any(p.requires_grad for p in run.teacher.network.parameters())
    assert list(run.loss.parameters()) == []
    assert list(run.loss.modules()) == [
        run.loss,
        *run.loss.loss.modules(),
        *run.loss.distillation.modules(),
    ]
    assert all(isinstance(value, torch.Tensor) for value in run.loss.state_dict().values())


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("mid_epoch", [False, True], ids=["end of epoch", "mid-epoch"])
@pytest.mark.parametrize("loss_first", [False, True])
def test_a_resumed_run_gives_the_same_result(teacher, mid_epoch, loss_first, tmp_path):
    run = Run(teacher)
    for _ in range(2):
        run.train_epoch()
        run.loss.end_epoch()
    if mid_epoch:
        run.train_epoch(steps=1)
    torch.save(
        [m.state_dict() for m in (*run.modules(), run.optimizer)], tmp_path / "checkpoint.pt"
    )
    run.train_epoch()
    run.loss.end_epoch()
    expected = run.train_epoch()

    resumed = Run(teacher)
    modules = [*resumed.modules(), resumed.optimizer]
    states = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    pairs = list(zip(modules, states, strict=True))
    for module, state in reversed(pairs) if loss_first else pairs:
        module.load_state_dict(state)
    resumed.train_epoch()
    resumed.loss.end_epoch()
    assert torch.equal(resumed.train_epoch(), expected)
    assert torch.equal(resumed.trunk_state(), run.trunk_state())


def test_batches_without_gradients_are_ignored():
    run = Run(num_epochs=1)
    run.loss.end_epoch()
    x, labels = next(batches(1))
    f = run.embedder(run.trunk(x))
    with torch.no_grad():
        run.trunk(torch.randn(99, 5))
    run.loss(f, labels)


def test_a_loss_without_its_batch_raises():
    run = Run(num_epochs=1)
    run.loss.end_epoch()
    x, labels = next(batches(1))
    with pytest.raises(RuntimeError, match="the teacher has seen no batch"):
        run.loss(torch.randn(12, D), labels)
    f = run.embedder(run.trunk(x))
    with pytest.raises(RuntimeError, match=r"passes were of \[12\] samples, but the loss has 11"):
        run.loss(f[1:], labels[1:])
    run.teacher.remove()
    run.trunk(x)
    with pytest.raises(RuntimeError, match="the teacher has seen no batch"):
        run.loss(f, labels)


def test_inputs_are_released():
    run = Run()
    run.train_epoch()
    assert not run.teacher._pending_batches
    run.loss.end_epoch()
    run.train_epoch()
    (embeddings,) = run.teacher._pending_batches
    assert embeddings.shape == (12, D)
    for _ in range(20):  # without a loss
        run.trunk(next(batches(1))[0])
    assert len(run.teacher._pending_batches) <= 8


@pytest.mark.parametrize("sizes", [(12,), (5, 7), (4, 4, 4)])
def test_a_batch_may_be_embedded_in_several_parts(sizes):
    run = Run(num_epochs=1)
    run.loss.end_epoch()
    x, labels = next(batches(1))
    run.trunk.eval()
    run.trunk(torch.randn(3, 5))  # not part of the batch
    f = torch.cat([run.embedder(run.trunk(part)) for part in x.split(sizes)])
    assert run.loss(f, labels) == ContrastiveLoss()(f, labels)
    run.trunk(torch.randn(3, 5))
    with pytest.raises(RuntimeError, match=r"passes were of \[3\] samples"):
        run.loss(f, labels)


def test_losses_may_share_a_teacher():
    run = Run(num_epochs=1)
    other = SelfDistillation(TripletMarginLoss(), run.teacher, num_epochs=1)
    run.loss.end_epoch()
    other.end_epoch()
    x, labels = next(batches(1))
    f = run.embedder(run.trunk(x))
    assert torch.allclose(
        run.loss(f, labels) - ContrastiveLoss()(f, labels),
        other(f, labels) - TripletMarginLoss()(f, labels),
        rtol=1e-4,
    )


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize(
    "make_loss",
    [
        lambda: CrossBatchMemory(ContrastiveLoss(), D, memory_size=36),
        lambda: MultipleLosses([ContrastiveLoss(), TripletMarginLoss()]),
        lambda: ArcFaceLoss(C, D),
        lambda: CenterContrastiveLoss(C, D),
        lambda: ClassInterferenceRegularizer(C, D).attach(TripletMarginLoss()),
    ],
    ids=["memory", "multiple", "proxies", "centers", "interference"],
)
def test_wraps_any_loss(teacher, make_loss):
    run = Run(teacher, loss=make_loss())
    for _ in range(3):
        loss = run.train_epoch()
        run.loss.end_epoch()
    assert loss.isfinite()
    assert run.loss.distillation_loss > 0


def test_equals_the_wrapped_loss_in_eval_mode():
    run = Run(num_epochs=1)
    run.loss.end_epoch()
    x, labels = next(batches(1))
    f = run.embedder(run.trunk(x))
    assert run.loss.eval()(f, labels) == ContrastiveLoss()(f, labels)


def test_passes_all_arguments_to_the_wrapped_loss():
    run = Run()
    x, labels = next(batches(1))
    f = run.embedder(run.trunk(x))
    pairs = MultiSimilarityMiner()(f, labels)
    assert run.loss(f, labels, indices_tuple=pairs) == ContrastiveLoss()(f, labels, pairs)


def test_a_copied_loss_shares_the_teacher_and_a_copied_trunk_has_none():
    run = Run(num_epochs=1)
    run.loss.end_epoch()
    copied = copy.deepcopy(run.loss)
    assert copied.teacher is run.teacher
    x, labels = next(batches(1))
    f = run.embedder(run.trunk(x))
    copy.deepcopy(run.trunk)(x[:3])
    copied(f, labels)


def test_the_weight_stays_at_alpha_after_the_last_epoch():
    run = Run(alpha=8.0, num_epochs=2)
    weights = []
    for _ in range(4):
        weights.append(run.loss.weight)
        run.loss.end_epoch()
    assert weights == [0, 4.0, 8.0, 8.0]


@pytest.mark.parametrize(("name", "value"), [("num_epochs", 0), ("alpha", -1), ("temperature", 0)])
def test_invalid_hyperparameters_are_reported(name, value):
    trunk, _ = make_networks()
    with pytest.raises(ValueError, match=f"^{name} must .*, got {value!r}"):
        SelfDistillation(
            ContrastiveLoss(), SnapshotTeacher(trunk), **{"num_epochs": 2, name: value}
        )
    with pytest.raises(ValueError, match=r"decay must lie in \[0, 1\), got 1"):
        EMATeacher(trunk, decay=1)


class OneHotDataset(torch.utils.data.Dataset):
    def __init__(self):
        generator = torch.Generator().manual_seed(2)
        self.labels = torch.arange(48) % C
        self.x = torch.randn(48, 5, generator=generator) + nn.functional.one_hot(self.labels, 5)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i], int(self.labels[i])


def make_trainer(run, hook=None, classifier=False, **kwargs):
    models = {"trunk": run.trunk, "embedder": run.embedder}
    losses = {"metric_loss": run.loss}
    if classifier:
        models["classifier"] = nn.Linear(D, C)
        losses["classifier_loss"] = nn.CrossEntropyLoss()
    return (TrainWithClassifier if classifier else MetricLossOnly)(
        models,
        {f"{k}_optimizer": torch.optim.Adam(m.parameters(), 0.01) for k, m in models.items()},
        12,
        losses,
        OneHotDataset(),
        data_device=torch.device("cpu"),
        dataloader_num_workers=0,
        end_of_epoch_hook=run.loss.end_of_epoch_hook(hook),
        **kwargs,
    )


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("classifier", [False, True])
@pytest.mark.parametrize(
    "mining_funcs",
    [{}, {"tuple_miner": MultiSimilarityMiner()}],
    ids=["no miner", "tuple miner"],
)
def test_works_in_the_trainers_of_pml_with_a_tester(teacher, classifier, mining_funcs):
    run = Run(teacher)
    tester = GlobalEmbeddingSpaceTester(
        accuracy_calculator=AccuracyCalculator(include=("precision_at_1",), k=1),
        dataloader_num_workers=0,
        data_device=torch.device("cpu"),
    )
    weights = []

    def hook(trainer):
        weights.append(run.loss.weight)
        tester.test({"val": OneHotDataset()}, trainer.epoch, *list(trainer.models.values())[:2])

    make_trainer(run, hook, classifier, mining_funcs=mining_funcs).train(num_epochs=4)
    assert weights == [12.5, 25.0, 37.5, 50.0]
    assert run.loss.distillation_loss > 0


def test_works_with_a_subset_batch_miner():
    class FirstHalf(BatchEasyHardMiner):
        def forward(self, embeddings, labels):
            return torch.arange(len(labels) // 2)

    run = Run()
    make_trainer(run, mining_funcs={"subset_batch_miner": FirstHalf()}).train(num_epochs=2)
    assert run.loss.distillation_loss > 0


def test_the_hook_returns_the_result_of_the_next_hook():
    run = Run()
    epochs = []

    def stop_after_two(trainer):
        epochs.append((trainer.epoch, run.loss.epoch))
        return len(epochs) < 2

    make_trainer(run, stop_after_two).train(num_epochs=5)
    assert epochs == [(1, 1), (2, 2)]
    assert run.loss.end_of_epoch_hook()(type("Trainer", (), {"epoch": 3})) is None


def test_the_epoch_of_a_resumed_trainer_is_continued():
    run = Run()
    make_trainer(run).train(start_epoch=3, num_epochs=3)
    assert run.loss.epoch == 3


def test_distillation_slows_the_drift_of_the_similarities():
    def drift(alpha):
        """The mean squared change of the similarities in an epoch."""
        np.random.seed(0)
        run = Run(alpha=alpha, num_epochs=4)
        for _ in range(3):
            run.train_epoch(steps=10)
            run.loss.end_epoch()
        x = torch.cat([x for x, _ in batches(10)])
        run.trunk.eval()
        before = nn.functional.normalize(run.embedder(run.trunk(x)))
        run.trunk.train()
        run.train_epoch(steps=10)
        run.trunk.eval()
        after = nn.functional.normalize(run.embedder(run.trunk(x)))
        return (before @ before.T - after @ after.T).square().mean()

    assert drift(alpha=1e4) < 0.5 * drift(alpha=0)


@pytest.mark.parametrize("teacher", TEACHERS)
def test_trunk_and_loss_can_be_pickled(teacher):
    run = Run(teacher)
    run.train_epoch()
    run.loss.end_epoch()
    x, labels = next(batches(1))
    run.trunk(x)
    trunk, embedder, loss = pickle.loads(pickle.dumps((run.trunk, run.embedder, run.loss)))
    assert not loss.teacher._pending_batches
    assert loss.teacher._trunk is trunk
    values = []
    for t, e, loss_func in ((run.trunk, run.embedder, run.loss), (trunk, embedder, loss)):
        torch.manual_seed(0)
        values.append(loss_func(e(t(x)), labels))
    assert torch.equal(*values)
