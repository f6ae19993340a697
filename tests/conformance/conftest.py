"""The table of components: a new one is put through all contracts by a row here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from pytorch_metric_learning.losses import MultiSimilarityLoss

from pml_extras.distillation import EMATeacher, SelfDistillation, SnapshotTeacher
from pml_extras.losses import CenterContrastiveLoss, ContextualLoss, ListwiseDistillationLoss
from pml_extras.miners import ContextualSimilarityMiner
from pml_extras.regularizers import ClassInterferenceRegularizer

NUM_CLASSES, EMBEDDING_SIZE, BATCH_SIZE = 6, 8, 24


@dataclass
class Component:
    """What the contracts need to know of a component."""

    name: str
    make: Callable[..., torch.nn.Module]
    call: Callable[[Any, torch.Tensor, torch.Tensor], Any]
    """Use it on embeddings and labels: a loss for losses, whatever comes out for the others."""
    is_loss: bool = True


def call_loss(loss_func, x, labels):
    return loss_func(x, labels)


def call_with_teacher(loss_func, x, labels):
    return loss_func(x, ref_emb=x.detach().relu())


def call_distillation(loss_func, x, labels):
    loss_func.epoch = 1
    trunk = loss_func.teacher._trunk.to(x.dtype)
    loss_func.teacher.network.to(x.dtype)
    return loss_func(trunk(x), labels)


def make_distillation(teacher):
    def make(**kwargs):
        torch.manual_seed(3)
        trunk = torch.nn.Linear(EMBEDDING_SIZE, EMBEDDING_SIZE, bias=False)
        watching = teacher(trunk)
        with torch.no_grad():
            trunk.weight += 0.3
        return SelfDistillation(MultiSimilarityLoss(), watching, num_epochs=2, **kwargs)

    return make


def make_interference(**kwargs):
    return ClassInterferenceRegularizer(
        NUM_CLASSES, EMBEDDING_SIZE, generator=torch.Generator().manual_seed(5), **kwargs
    )


COMPONENTS = [
    Component(
        "CenterContrastiveLoss",
        lambda **kw: CenterContrastiveLoss(NUM_CLASSES, EMBEDDING_SIZE, **kw),
        call_loss,
    ),
    Component(
        "CenterContrastiveLoss-average",
        lambda **kw: CenterContrastiveLoss(
            NUM_CLASSES, EMBEDDING_SIZE, center_update="average", **kw
        ),
        call_loss,
    ),
    Component("ContextualLoss", ContextualLoss, call_loss),
    Component("ListwiseDistillationLoss", ListwiseDistillationLoss, call_with_teacher),
    Component("SelfDistillation-snapshot", make_distillation(SnapshotTeacher), call_distillation),
    Component("SelfDistillation-EMA", make_distillation(EMATeacher), call_distillation),
    Component(
        "ClassInterferenceRegularizer",
        make_interference,
        lambda regularizer, x, labels: regularizer.interfere(x, labels),
        is_loss=False,
    ),
    Component(
        "ClassInterferenceRegularizer-attached",
        lambda **kw: make_interference(**kw).attach(MultiSimilarityLoss()),
        call_loss,
    ),
    Component("ContextualSimilarityMiner", ContextualSimilarityMiner, call_loss, is_loss=False),
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for argument, rows in {
        "component": COMPONENTS,
        "loss_component": [c for c in COMPONENTS if c.is_loss],
    }.items():
        if argument in metafunc.fixturenames:
            metafunc.parametrize(argument, rows, ids=lambda c: c.name)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(BATCH_SIZE, EMBEDDING_SIZE)


@pytest.fixture
def labels() -> torch.Tensor:
    return torch.arange(NUM_CLASSES).repeat_interleave(BATCH_SIZE // NUM_CLASSES)
