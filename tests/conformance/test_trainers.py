"""Short training runs with PML's trainers, testers and logging presets."""

from __future__ import annotations

import copy
import csv
import functools

import pytest
import torch
from pytorch_metric_learning import losses as pml_losses
from pytorch_metric_learning import testers, trainers
from pytorch_metric_learning.miners import MultiSimilarityMiner
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.logging_presets import HookContainer, get_record_keeper
from torch import nn

from pml_extras.inference import ContextualKNN

C, D, CPU = 4, 6, torch.device("cpu")
METRIC = "mean_average_precision_at_r"


class Data(torch.utils.data.Dataset):
    """Noisy one-hot vectors of the class, or pairs of them for two streams."""

    def __init__(self, two_streams=False, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.arange(48) % C
        self.x = torch.randn(48, 5, generator=generator) + 2 * nn.functional.one_hot(self.labels, 5)
        self.two_streams = two_streams

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        if self.two_streams:
            return self.x[i], self.x[(i + C) % 48], int(self.labels[i])
        return self.x[i], int(self.labels[i])


def networks():
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU())
    return {"trunk": trunk, "embedder": nn.Linear(8, D)}


def build(make_loss, trainer=trainers.MetricLossOnly, miner=None):
    """A trainer whose losses come from make_loss(num_classes, embedding_size, networks)."""
    models, loss_funcs, mining_funcs, extra = networks(), {}, {}, {}
    student = [models["trunk"], models["embedder"]]
    two_streams = trainer is trainers.TwoStreamMetricLoss
    if trainer is trainers.CascadedEmbeddings:
        extra["embedding_sizes"] = [2, 4]
        for i, size in enumerate(extra["embedding_sizes"]):
            loss_funcs[f"metric_loss_{i}"] = make_loss(C, size, student)
            if miner:
                mining_funcs[f"tuple_miner_{i}"] = miner
    else:
        loss_funcs["metric_loss"] = make_loss(C, D, student)
        if miner:
            mining_funcs["tuple_miner"] = miner
    if trainer in (trainers.TrainWithClassifier, trainers.DeepAdversarialMetricLearning):
        models["classifier"] = nn.Linear(D, C)
        loss_funcs["classifier_loss"] = nn.CrossEntropyLoss()
    if trainer is trainers.DeepAdversarialMetricLearning:
        models["generator"] = nn.Linear(24, 8)
        loss_funcs |= {"synth_loss": pml_losses.TripletMarginLoss()}
        loss_funcs |= {"g_adv_loss": pml_losses.TripletMarginLoss()}
        extra["g_triplets_per_anchor"] = 3
        names = (*loss_funcs, "g_hard_loss", "g_reg_loss")
        extra["loss_weights"] = dict.fromkeys(names, 1)
    optimizers = {
        f"{name}_optimizer": torch.optim.Adam(module.parameters(), 0.01)
        for name, module in (models | loss_funcs).items()
        if list(module.parameters())
    }
    return trainer(
        models=models,
        optimizers=optimizers,
        batch_size=12,
        loss_funcs=loss_funcs,
        mining_funcs=mining_funcs,
        dataset=Data(two_streams),
        sampler=torch.utils.data.SequentialSampler(range(48)),
        data_device=CPU,
        dataloader_num_workers=0,
        **extra,
    )


def with_hooks(trainer, component, hook=None):
    """At the end of each epoch, call those losses that need it, then ``hook``."""
    for name, loss_func in trainer.loss_funcs.items():
        if component.observes_network and name.startswith("metric_loss"):
            hook = loss_func.end_of_epoch_hook(hook)
    trainer.end_of_epoch_hook = hook or (lambda trainer: None)
    return trainer


def weights(trainer):
    modules = (trainer.models | trainer.loss_funcs).values()
    return [v for m in modules for v in m.state_dict().values() if isinstance(v, torch.Tensor)]


TRAINERS = {
    "MetricLossOnly": trainers.MetricLossOnly,
    "TrainWithClassifier": trainers.TrainWithClassifier,
    "CascadedEmbeddings": trainers.CascadedEmbeddings,
    "DeepAdversarialMetricLearning": trainers.DeepAdversarialMetricLearning,
    "TwoStreamMetricLoss": trainers.TwoStreamMetricLoss,
}


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.components_with(needs_teacher_embeddings=False)
@pytest.mark.filterwarnings("ignore:num_neighbors")
def test_trains_in_every_trainer(loss_component, trainer):
    run = with_hooks(build(loss_component.make, TRAINERS[trainer]), loss_component)
    before = copy.deepcopy(weights(run))
    run.train(num_epochs=3)
    after = weights(run)
    assert all(v.isfinite().all() for v in after if v.is_floating_point())
    assert not all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


@pytest.mark.components_with(needs_teacher_embeddings=True)
def test_trainers_without_teacher_embeddings_are_refused(loss_component):
    with pytest.raises(ValueError, match="teacher"):
        build(loss_component.make).train(num_epochs=1)


@pytest.mark.parametrize("trainer", ["MetricLossOnly", "CascadedEmbeddings", "TwoStreamMetricLoss"])
@pytest.mark.components_with(needs_teacher_embeddings=False, takes_tuples=True)
@pytest.mark.filterwarnings("ignore:num_neighbors")
def test_our_miner_works_in_trainers(loss_component, miner_component, trainer):
    run = build(loss_component.make, TRAINERS[trainer], miner_component.make())
    with_hooks(run, loss_component).train(num_epochs=3)
    assert all(v.isfinite().all() for v in weights(run) if v.is_floating_point())


def make_tester(kind, knn_func, **kwargs):
    calculator = AccuracyCalculator(
        include=("precision_at_1", METRIC), k="max_bin_count", knn_func=knn_func
    )
    return kind(accuracy_calculator=calculator, dataloader_num_workers=0, data_device=CPU, **kwargs)


@pytest.mark.parametrize(
    "kind",
    [
        testers.GlobalEmbeddingSpaceTester,
        testers.WithSameParentLabelTester,
        testers.GlobalTwoStreamEmbeddingSpaceTester,
    ],
)
def test_knn_func_works_in_every_tester(knn_component, kind):
    class Labelled(Data):
        def __getitem__(self, i):
            if kind is testers.WithSameParentLabelTester:
                return self.x[i], torch.tensor([self.labels[i], self.labels[i] % 2])
            return super().__getitem__(i)

    data = Labelled(kind is testers.GlobalTwoStreamEmbeddingSpaceTester)
    models = networks()
    tester = make_tester(kind, knn_component.make())
    results = tester.test({"val": data}, 1, models["trunk"], models["embedder"])
    assert 0 < results["val"][f"{METRIC}_level0"] <= 1


def make_logged_run(component, folder, miner=None, **kwargs):
    """A trainer with all of PML's logging hooks."""
    run = build(functools.partial(component.make, **kwargs), miner=miner)
    keeper, _, _ = get_record_keeper(str(folder / "logs"), str(folder / "tensorboard"))
    hooks = HookContainer(keeper, primary_metric=METRIC, validation_split_name="val", log_freq=1)
    tester = make_tester(
        testers.GlobalEmbeddingSpaceTester,
        ContextualKNN(num_neighbors=5),
        end_of_testing_hook=hooks.end_of_testing_hook,
    )
    run.end_of_iteration_hook = hooks.end_of_iteration_hook
    models = folder / "models"
    hook = hooks.end_of_epoch_hook(tester, {"val": Data(seed=1)}, str(models))
    return with_hooks(run, component, hook), hooks, models


def check_resuming(component, miner, folder):
    """A run that is resumed from PML's checkpoints must equal one without interruption."""
    uninterrupted, _, _ = make_logged_run(component, folder / "uninterrupted", miner)
    uninterrupted.train(num_epochs=4)

    stopped, _, _ = make_logged_run(component, folder / "run", miner)
    stopped.train(num_epochs=2)
    resumed, hooks, models = make_logged_run(component, folder / "run", miner)
    start = hooks.load_latest_saved_models(resumed, str(models), device=CPU)
    assert start == 3
    resumed.train(start_epoch=start, num_epochs=4)

    for actual, expected in zip(weights(resumed), weights(uninterrupted), strict=True):
        assert torch.equal(actual, expected)
    for name, optimizer in uninterrupted.optimizers.items():
        expected = optimizer.state_dict()["state"]
        for key, state in resumed.optimizers[name].state_dict()["state"].items():
            assert all(torch.equal(v, expected[key][k]) for k, v in state.items())


@pytest.mark.components_with(needs_teacher_embeddings=False, takes_tuples=True)
@pytest.mark.filterwarnings("ignore:num_neighbors")
def test_a_resumed_run_continues_exactly(loss_component, tmp_path):
    check_resuming(loss_component, MultiSimilarityMiner(), tmp_path)


@pytest.mark.components_with(needs_teacher_embeddings=False, takes_tuples=True)
@pytest.mark.filterwarnings("ignore:num_neighbors")
def test_a_resumed_run_with_our_miner_continues_exactly(loss_component, miner_component, tmp_path):
    check_resuming(loss_component, miner_component.make(), tmp_path)


@pytest.mark.components_with(needs_teacher_embeddings=False)
@pytest.mark.filterwarnings("ignore:num_neighbors")
def test_stats_are_logged(loss_component, tmp_path):
    run, hooks, _ = make_logged_run(loss_component, tmp_path, collect_stats=True)
    run.train(num_epochs=2)
    for module in run.loss_funcs["metric_loss"].modules():
        if type(module).__module__.startswith("pml_extras") and module.collect_stats:
            (table,) = (tmp_path / "logs").glob(f"*_{type(module).__name__}.csv")
            rows = list(csv.DictReader(table.open()))
            assert len(rows) == 2 * 4
            stats = getattr(module, "_record_these_stats", [])
            assert {*module._record_these, *stats} <= set(rows[0])
            assert all(any(float(row[name]) for row in rows) for name in stats)
    assert list((tmp_path / "tensorboard").iterdir())
    assert hooks.record_keeper
