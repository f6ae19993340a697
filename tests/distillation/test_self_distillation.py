from __future__ import annotations

import copy
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

from pml_extras.distillation import EMATeacher, SelfDistillation, SnapshotTeacher
from pml_extras.losses import CenterContrastiveLoss, ListwiseDistillationLoss
from pml_extras.regularizers import ClassInterferenceRegularizer

C, D = 4, 3
TEACHERS = {"snapshot": SnapshotTeacher, "ema": lambda t, e: EMATeacher(t, e, decay=0.5)}


def networks():
    torch.manual_seed(0)
    # Batch norm and dropout: a teacher that is not in eval mode would show.
    trunk = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.ReLU())
    return trunk, nn.Linear(8, D)


def batches(n, size=12):
    generator = torch.Generator().manual_seed(1)
    for _ in range(n):
        yield torch.randn(size, 5, generator=generator), torch.arange(size) % C


class Run:
    """A hand-written training loop."""

    def __init__(self, teacher="snapshot", alpha=50.0, num_epochs=4, collect_stats=True, loss=None):
        self.trunk, self.embedder = networks()
        self.teacher = TEACHERS[teacher](self.trunk, self.embedder)
        self.loss = SelfDistillation(
            loss or ContrastiveLoss(),
            self.teacher,
            num_epochs,
            alpha=alpha,
            collect_stats=collect_stats,
        )
        self.optimizer = torch.optim.Adam(self.parts().parameters(), lr=0.01)

    def parts(self):
        return nn.ModuleList([self.trunk, self.embedder, self.loss])

    def epoch(self, steps=3):
        torch.manual_seed(100 + self.loss.epoch)
        for x, labels in batches(steps):
            self.optimizer.zero_grad()
            loss = self.loss(self.embedder(self.trunk(x)), labels)
            loss.backward()
            self.optimizer.step()
        return loss

    def weights(self):
        return torch.cat([p.detach().flatten() for p in self.trunk.state_dict().values()])


@pytest.mark.parametrize("teacher", TEACHERS)
def test_loss_is_base_plus_scheduled_distillation(teacher):
    run = Run(teacher, alpha=20.0, num_epochs=4)
    run.epoch()
    run.loss.end_epoch()
    run.epoch()
    run.loss.end_epoch()
    x, labels = next(batches(1))
    f = run.embedder(run.trunk(x))
    loss = run.loss(f, labels)
    run.teacher.network.eval()
    trunk, embedder = run.teacher.network.children()
    expected = ListwiseDistillationLoss()(f, ref_emb=embedder(trunk(x)))
    assert run.loss.weight == 20.0 * 2 / 4
    assert torch.allclose(loss, ContrastiveLoss()(f, labels) + 10.0 * expected)
    assert expected > 0
    assert run.loss.distillation_weight == 10.0
    assert run.loss.distillation_loss == pytest.approx(expected.item())
    assert run.loss.base_loss == pytest.approx(ContrastiveLoss()(f, labels).item())


def test_zero_in_the_first_epoch_whose_teacher_is_not_asked():
    run = Run(alpha=1e6)
    run.teacher.embed = None  # calling it would fail
    x, labels = next(batches(1))
    f = run.embedder(run.trunk(x))
    assert run.loss(f, labels) == ContrastiveLoss()(f, labels)


def test_zero_when_student_and_teacher_coincide():
    run = Run(alpha=1e6, num_epochs=1)
    run.loss.end_epoch()  # the teacher is the network
    x, labels = next(batches(1))
    run.trunk.eval()
    f = run.embedder(run.trunk(x))
    assert run.loss(f, labels) == ContrastiveLoss()(f, labels)


def test_snapshot_is_the_network_at_the_last_epochs_end():
    run = Run()
    run.epoch()
    run.loss.end_epoch()
    at_end = copy.deepcopy(run.trunk.state_dict())
    run.epoch()
    teacher_trunk, _ = run.teacher.network.children()
    assert all(torch.equal(v, at_end[k]) for k, v in teacher_trunk.state_dict().items())
    assert not torch.equal(run.trunk.state_dict()["0.weight"], at_end["0.weight"])


def test_ema_is_the_moving_average_of_the_weights_at_each_pass():
    run = Run("ema")
    expected = None
    for x, labels in batches(4):
        now = run.trunk[0].weight.detach().clone()
        expected = now if expected is None else 0.5 * expected + 0.5 * now
        run.loss(run.embedder(run.trunk(x)), labels).backward()
        run.optimizer.step()
    teacher_trunk, _ = run.teacher.network.children()
    assert torch.allclose(teacher_trunk[0].weight, expected, atol=1e-7)


@pytest.mark.parametrize("teacher", TEACHERS)
def test_teacher_stays_in_eval_mode_and_out_of_sight(teacher):
    run = Run(teacher)
    run.epoch()
    run.loss.end_epoch()
    run.parts().train()
    run.epoch()
    assert not any(m.training for m in run.teacher.network.modules())
    assert not any(p.requires_grad for p in run.teacher.network.parameters())
    assert list(run.loss.parameters()) == []
    assert list(run.loss.modules()) == [
        run.loss,
        *run.loss.loss.modules(),
        *run.loss.distillation.modules(),
    ]
    assert set(run.loss.state_dict()) == {"_extra_state"}


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("middle", [False, True], ids=["epoch's end", "mid-epoch"])
@pytest.mark.parametrize("loss_first", [False, True])
def test_a_resumed_run_goes_on_exactly(teacher, middle, loss_first, tmp_path):
    run = Run(teacher)
    for _ in range(2):
        run.epoch()
        run.loss.end_epoch()
    if middle:
        run.epoch(steps=1)
    torch.save([p.state_dict() for p in (*run.parts(), run.optimizer)], tmp_path / "checkpoint.pt")
    run.epoch()
    run.loss.end_epoch()
    expected = run.epoch()

    resumed = Run(teacher)
    parts = [*resumed.parts(), resumed.optimizer]
    states = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    pairs = list(zip(parts, states, strict=True))
    for part, state in reversed(pairs) if loss_first else pairs:
        part.load_state_dict(state)
    resumed.epoch()
    resumed.loss.end_epoch()
    assert torch.equal(resumed.epoch(), expected)
    assert torch.equal(resumed.weights(), run.weights())


def test_pending_batches_without_gradients_go_unnoticed():
    run = Run(num_epochs=1)
    run.loss.end_epoch()
    x, labels = next(batches(1))
    f = run.embedder(run.trunk(x))
    with torch.no_grad():
        run.trunk(torch.randn(99, 5))
    run.loss(f, labels)


def test_a_loss_without_its_batch_says_so():
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


def test_inputs_are_not_held_on_to():
    run = Run()
    run.epoch()
    assert not run.teacher._pending_batches
    run.loss.end_epoch()
    run.epoch()
    (embeddings,) = run.teacher._pending_batches
    assert embeddings.shape == (12, D)
    for _ in range(20):  # and no loss asks
        run.trunk(next(batches(1))[0])
    assert len(run.teacher._pending_batches) <= 8


@pytest.mark.parametrize("sizes", [(12,), (5, 7), (4, 4, 4)])
def test_samples_may_come_in_several_pending_batches(sizes):
    run = Run(num_epochs=1)
    run.loss.end_epoch()
    x, labels = next(batches(1))
    run.trunk.eval()
    run.trunk(torch.randn(3, 5))  # not the loss's
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
def test_around_any_loss(teacher, make_loss):
    run = Run(teacher, loss=make_loss())
    for _ in range(3):
        loss = run.epoch()
        run.loss.end_epoch()
    assert loss.isfinite()
    assert run.loss.distillation_loss > 0


def test_eval_mode_is_the_wrapped_loss_alone():
    run = Run(num_epochs=1)
    run.loss.end_epoch()
    x, labels = next(batches(1))
    f = run.embedder(run.trunk(x))
    assert run.loss.eval()(f, labels) == ContrastiveLoss()(f, labels)


def test_all_arguments_go_to_the_wrapped_loss():
    run = Run()
    x, labels = next(batches(1))
    f = run.embedder(run.trunk(x))
    pairs = MultiSimilarityMiner()(f, labels)
    assert run.loss(f, labels, indices_tuple=pairs) == ContrastiveLoss()(f, labels, pairs)


def test_copies_of_a_loss_share_the_teacher_and_a_copied_trunk_is_not_watched():
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


@pytest.mark.parametrize(
    ("setting", "value"), [("num_epochs", 0), ("alpha", -1), ("temperature", 0)]
)
def test_bad_settings_are_named(setting, value):
    trunk, _ = networks()
    with pytest.raises(ValueError, match=f"^{setting} must .*, got {value!r}"):
        SelfDistillation(
            ContrastiveLoss(), SnapshotTeacher(trunk), **{"num_epochs": 2, setting: value}
        )
    with pytest.raises(ValueError, match=r"decay must lie in \[0, 1\), got 1"):
        EMATeacher(trunk, decay=1)


class Data(torch.utils.data.Dataset):
    def __init__(self):
        generator = torch.Generator().manual_seed(2)
        self.labels = torch.arange(48) % C
        self.x = torch.randn(48, 5, generator=generator) + nn.functional.one_hot(self.labels, 5)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i], int(self.labels[i])


def trainer(run, hook=None, classifier=False, **kwargs):
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
        Data(),
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
def test_in_unchanged_trainers_with_a_tester(teacher, classifier, mining_funcs):
    run = Run(teacher)
    tester = GlobalEmbeddingSpaceTester(
        accuracy_calculator=AccuracyCalculator(include=("precision_at_1",), k=1),
        dataloader_num_workers=0,
        data_device=torch.device("cpu"),
    )
    weights = []

    def hook(trainer):
        weights.append(run.loss.weight)
        tester.test({"val": Data()}, trainer.epoch, *list(trainer.models.values())[:2])

    trainer(run, hook, classifier, mining_funcs=mining_funcs).train(num_epochs=4)
    assert weights == [12.5, 25.0, 37.5, 50.0]
    assert run.loss.distillation_loss > 0


def test_with_a_subset_batch_miner():
    class FirstHalf(BatchEasyHardMiner):
        def forward(self, embeddings, labels):
            return torch.arange(len(labels) // 2)

    run = Run()
    trainer(run, mining_funcs={"subset_batch_miner": FirstHalf()}).train(num_epochs=2)
    assert run.loss.distillation_loss > 0


def test_the_hooks_return_value_is_passed_on():
    run = Run()
    seen = []

    def stop(trainer):
        seen.append((trainer.epoch, run.loss.epoch))
        return len(seen) < 2

    trainer(run, stop).train(num_epochs=5)
    assert seen == [(1, 1), (2, 2)]
    assert run.loss.end_of_epoch_hook()(type("Trainer", (), {"epoch": 3})) is None


def test_a_resumed_trainers_epochs_count_on():
    run = Run()
    trainer(run).train(start_epoch=3, num_epochs=3)
    assert run.loss.epoch == 3


def test_distillation_holds_the_network_back():
    # A strong teacher's pull keeps similarities where they were; alone, the loss moves them.
    def drift(alpha):
        np.random.seed(0)
        run = Run(alpha=alpha, num_epochs=4)
        for _ in range(3):
            run.epoch(steps=10)
            run.loss.end_epoch()
        x = torch.cat([x for x, _ in batches(10)])
        run.trunk.eval()
        before = nn.functional.normalize(run.embedder(run.trunk(x)))
        run.trunk.train()
        run.epoch(steps=10)
        run.trunk.eval()
        after = nn.functional.normalize(run.embedder(run.trunk(x)))
        return (before @ before.T - after @ after.T).square().mean()

    assert drift(alpha=1e4) < 0.5 * drift(alpha=0)


@pytest.mark.parametrize("teacher", TEACHERS)
def test_trunk_and_loss_can_be_pickled(teacher):
    run = Run(teacher)
    run.epoch()
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
