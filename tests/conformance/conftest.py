"""Runs each conformance test for the rows of the table that it applies to."""

from __future__ import annotations

import pytest
import torch
from pytorch_metric_learning import miners

from .capabilities import EMBEDDING_SIZE, NUM_CLASSES, Component
from .components import COMPONENTS

BATCH_SIZE = 24

# A test's argument, and the kinds of component that it is called with.
KINDS = {
    "any_component": ("loss", "miner", "regularizer", "knn_func"),
    "component": ("loss", "miner", "regularizer"),
    "loss_component": ("loss",),
    "miner_component": ("miner",),
    "knn_component": ("knn_func",),
}
PML_MINERS = {
    "angular": lambda: miners.AngularMiner(angle=5),
    "batch-easy-hard": miners.BatchEasyHardMiner,
    "batch-hard": miners.BatchHardMiner,
    "distance-weighted": miners.DistanceWeightedMiner,
    "multi-similarity": miners.MultiSimilarityMiner,
    "pair-margin": miners.PairMarginMiner,
    "triplet-margin": lambda: miners.TripletMarginMiner(margin=1),
    "uniform-histogram": miners.UniformHistogramMiner,
}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "components_with(capability=bool, ...): only for components with these capabilities",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marks = metafunc.definition.iter_markers("components_with")
    required = {name: value for mark in marks for name, value in mark.kwargs.items()}

    def fits(component: Component) -> bool:
        return all(bool(getattr(component, name)) == value for name, value in required.items())

    for argument, kinds in KINDS.items():
        if argument in metafunc.fixturenames:
            rows = [c for c in COMPONENTS if c.kind in kinds and fits(c)]
            metafunc.parametrize(argument, rows, ids=lambda component: component.name)
    if "make_miner" in metafunc.fixturenames:
        # PML's miners and ours.
        ours = {c.name: c.make for c in COMPONENTS if c.kind == "miner"}
        all_miners = PML_MINERS | ours
        metafunc.parametrize("make_miner", all_miners.values(), ids=all_miners.keys())


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(BATCH_SIZE, EMBEDDING_SIZE)


@pytest.fixture
def labels() -> torch.Tensor:
    return torch.arange(NUM_CLASSES).repeat_interleave(BATCH_SIZE // NUM_CLASSES)
