"""Contracts in PML's trainers, testers and logging presets: real runs on small data."""

from __future__ import annotations

import copy

import pytest
import torch
from pytorch_metric_learning import losses as pml_losses
from pytorch_metric_learning import testers, trainers
from pytorch_metric_learning.miners import MultiSimilarityMiner
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.logging_presets import HookContainer, get_record_keeper
from torch import nn

from pml_extras.distillation import EMATeacher, SelfDistillation, SnapshotTeacher
from pml_extras.inference import ContextualKNN
from pml_extras.losses import CenterContrastiveLoss, ContextualLoss, CrossBatchMemory
from pml_extras.miners import ContextualSimilarityMiner
from pml_extras.regularizers import ClassInterferenceRegularizer

C, D, CPU = 4, 6, torch.device("cpu")
METRIC = "mean_average_precision_at_r"


class Data(torch.utils.data.Dataset):
    """Five coordinates, of which the class raises one; also as pairs, for two streams."""

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


def interfered(size=D):
    generator = torch.Generator().manual_seed(3)
    return ClassInterferenceRegularizer(C, size, strength=0.3, generator=generator).attach(
        pml_losses.MultiSimilarityLoss()
    )


# Given the networks and the size of the embeddings that the loss will see.
METHODS = {
    "center": lambda models, size: CenterContrastiveLoss(C, size),
    "center-average": lambda models, size: CenterContrastiveLoss(C, size, center_update="average"),
    "contextual": lambda models, size: ContextualLoss(num_neighbors=3),
    "contextual-memory": lambda models, size: CrossBatchMemory(
        ContextualLoss(num_neighbors=3), size, memory_size=30
    ),
    "interference": lambda models, size: interfered(size),
    "snapshot": lambda models, size: SelfDistillation(
        pml_losses.MultiSimilarityLoss(), SnapshotTeacher(*models), 4
    ),
    "ema": lambda models, size: SelfDistillation(
        CenterContrastiveLoss(C, size), EMATeacher(*models, decay=0.8), 4
    ),
    "all": lambda models, size: SelfDistillation(interfered(size), SnapshotTeacher(*models), 4),
}


def networks():
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU())
    return {"trunk": trunk, "embedder": nn.Linear(8, D)}


def build(method, trainer=trainers.MetricLossOnly, miner=None, **kwargs):
    """A trainer with the method in it, and what has to be called at the end of an epoch."""
    models, loss_funcs, mining_funcs, extra = networks(), {}, {}, {}
    student = [models["trunk"], models["embedder"]]
    two_streams = trainer is trainers.TwoStreamMetricLoss
    if trainer is trainers.CascadedEmbeddings:
        extra["embedding_sizes"] = [2, 4]
        for i, size in enumerate(extra["embedding_sizes"]):
            loss_funcs[f"metric_loss_{i}"] = METHODS[method](student, size)
            if miner:
                mining_funcs[f"tuple_miner_{i}"] = miner
    else:
        loss_funcs["metric_loss"] = METHODS[method](student, D)
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
        **kwargs,
    )


def hooked(trainer, hook=None):
    """Let every distilling loss know of the ends of epochs, and then call the hook."""
    for loss_func in trainer.loss_funcs.values():
        if isinstance(loss_func, SelfDistillation):
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


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.filterwarnings("ignore:num_neighbors")
def test_every_method_in_every_trainer(method, trainer):
    torch.manual_seed(0)
    run = hooked(build(method, TRAINERS[trainer]))
    before = copy.deepcopy(weights(run))
    run.train(num_epochs=3)
    after = weights(run)
    assert all(v.isfinite().all() for v in after if v.is_floating_point())
    assert not all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("trainer", ["MetricLossOnly", "CascadedEmbeddings", "TwoStreamMetricLoss"])
@pytest.mark.filterwarnings("ignore:num_neighbors")
def test_our_miner_in_trainers(trainer):
    run = hooked(build("contextual", TRAINERS[trainer], ContextualSimilarityMiner()))
    run.train(num_epochs=3)
    assert all(v.isfinite().all() for v in weights(run) if v.is_floating_point())


def make_tester(kind, **kwargs):
    calculator = AccuracyCalculator(
        include=("precision_at_1", METRIC), k="max_bin_count", knn_func=ContextualKNN(5)
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
def test_every_tester_with_contextual_knn(kind):
    class Labelled(Data):
        def __getitem__(self, i):
            if kind is testers.WithSameParentLabelTester:
                return self.x[i], torch.tensor([self.labels[i], self.labels[i] % 2])
            return super().__getitem__(i)

    data = Labelled(kind is testers.GlobalTwoStreamEmbeddingSpaceTester)
    models = networks()
    results = make_tester(kind).test({"val": data}, 1, models["trunk"], models["embedder"])
    assert 0 < results["val"][f"{METRIC}_level0"] <= 1


def logged(method, folder, miner=None):
    """A trainer with PML's whole logging preset around it."""
    run = build(method, miner=miner)
    keeper, _, _ = get_record_keeper(str(folder / "logs"), str(folder / "tensorboard"))
    hooks = HookContainer(keeper, primary_metric=METRIC, validation_split_name="val", log_freq=1)
    watcher = make_tester(
        testers.GlobalEmbeddingSpaceTester, end_of_testing_hook=hooks.end_of_testing_hook
    )
    run.end_of_iteration_hook = hooks.end_of_iteration_hook
    models = folder / "models"
    hook = hooks.end_of_epoch_hook(watcher, {"val": Data(seed=1)}, str(models))
    return hooked(run, hook), hooks, models


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("miner", [None, "contextual"])
@pytest.mark.filterwarnings("ignore:num_neighbors")
def test_a_run_resumed_from_pmls_checkpoints_goes_on_exactly(method, miner, tmp_path):
    miner = ContextualSimilarityMiner() if miner else MultiSimilarityMiner()
    if method == "contextual-memory":
        miner = None  # it takes one of its own
    whole, _, _ = logged(method, tmp_path / "whole", miner)
    whole.train(num_epochs=4)

    stopped, _, _ = logged(method, tmp_path / "run", miner)
    stopped.train(num_epochs=2)
    resumed, hooks, models = logged(method, tmp_path / "run", miner)
    start = hooks.load_latest_saved_models(resumed, str(models), device=CPU)
    assert start == 3
    resumed.train(start_epoch=start, num_epochs=4)

    for actual, expected in zip(weights(resumed), weights(whole), strict=True):
        assert torch.equal(actual, expected)
    for name, optimizer in whole.optimizers.items():
        expected = optimizer.state_dict()["state"]
        for key, state in resumed.optimizers[name].state_dict()["state"].items():
            assert all(torch.equal(v, expected[key][k]) for k, v in state.items())


def test_stats_reach_the_logs(tmp_path):
    run, hooks, _ = logged("contextual", tmp_path)
    run.loss_funcs["metric_loss"] = ContextualLoss(num_neighbors=3, collect_stats=True)
    run.train(num_epochs=1)
    table = (tmp_path / "logs" / "metric_loss_ContextualLoss.csv").read_text().splitlines()
    columns = table[0].split(",")
    assert {"num_neighbors", "avg_neighborhood_size", "avg_pos_context"} <= set(columns)
    assert len(table) == 1 + 4
    assert float(table[1].split(",")[columns.index("avg_neighborhood_size")]) >= 3
    assert list((tmp_path / "tensorboard").iterdir())
    assert hooks.record_keeper
