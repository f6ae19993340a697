"""The table of our components: a new one is put through all contracts by a row here."""

from __future__ import annotations

import torch
from pytorch_metric_learning.losses import MultiSimilarityLoss
from torch import nn

from pml_extras.distillation import EMATeacher, SelfDistillation, SnapshotTeacher
from pml_extras.inference import ContextualKNN
from pml_extras.losses import (
    CenterContrastiveLoss,
    ContextualLoss,
    CrossBatchMemory,
    ListwiseDistillationLoss,
)
from pml_extras.miners import ContextualSimilarityMiner
from pml_extras.regularizers import ClassInterferenceRegularizer

from .capabilities import Component


def plain(cls, **settings):
    """The factory of a class that asks for no sizes."""
    return lambda num_classes, embedding_size, models, **kwargs: cls(**settings, **kwargs)


def sized(cls, **settings):
    """The factory of a class that asks for the number of classes and the size of embeddings."""
    return lambda num_classes, embedding_size, models, **kwargs: cls(
        num_classes, embedding_size, **settings, **kwargs
    )


def interference(num_classes, embedding_size, models, strength=0.3, **kwargs):
    generator = torch.Generator().manual_seed(5)
    return ClassInterferenceRegularizer(
        num_classes, embedding_size, strength=strength, generator=generator, **kwargs
    )


def interfered(num_classes, embedding_size, models, strength=0.3, collect_stats=None, **kwargs):
    regularizer = interference(
        num_classes, embedding_size, models, strength, collect_stats=collect_stats
    )
    return regularizer.attach(MultiSimilarityLoss(collect_stats=collect_stats, **kwargs))


def remembered(num_classes, embedding_size, models, collect_stats=None, **kwargs):
    loss = ContextualLoss(collect_stats=collect_stats, **kwargs)
    return CrossBatchMemory(loss, embedding_size, memory_size=60, collect_stats=collect_stats)


class Mixing(nn.Linear):
    """A network for teachers to watch, for inputs of any dtype on any device."""

    def __init__(self, size):
        super().__init__(size, size, bias=False)
        nn.init.eye_(self.weight)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x))


def distilled(teacher, make_loss, **settings):
    def factory(num_classes, embedding_size, models, collect_stats=None, **kwargs):
        loss = make_loss(num_classes, embedding_size, None, collect_stats=collect_stats, **kwargs)
        networks = models or [Mixing(embedding_size)]
        watching = teacher(*networks, **settings)
        loss_func = SelfDistillation(loss, watching, num_epochs=4, collect_stats=collect_stats)
        if models is None:  # an epoch has ended, and the network has moved on from the teacher
            watching.before_training_pass()
            loss_func.end_epoch()
            with torch.no_grad():
                networks[0].weight += 0.3
        return loss_func

    return factory


COMPONENTS = [
    Component(
        "CenterContrastiveLoss",
        "loss",
        sized(CenterContrastiveLoss),
        weights_samples=True,
        takes_references=False,
        supports_cross_batch_memory=False,
        cosine_only=True,
        regularizes_weights=True,
    ),
    Component(
        "CenterContrastiveLoss-ema",
        "loss",
        sized(CenterContrastiveLoss, center_update="ema"),
        weights_samples=True,
        takes_references=False,
        supports_cross_batch_memory=False,
        cosine_only=True,
        synced_buffers=("centers", "class_counts"),
    ),
    Component("ContextualLoss", "loss", plain(ContextualLoss), cosine_only=True),
    Component(
        "ListwiseDistillationLoss",
        "loss",
        plain(ListwiseDistillationLoss),
        takes_tuples=False,
        needs_labels=False,
        needs_teacher_embeddings=True,
        takes_references=False,
        supports_cross_batch_memory=False,
        cosine_only=True,
    ),
    Component(
        "CrossBatchMemory-ContextualLoss",
        "loss",
        remembered,
        syncs_device=True,
        takes_references=False,
        supports_cross_batch_memory=False,
        cosine_only=True,
        keeps_dtypes=False,  # PML's memory takes those of the latest batch
    ),
    Component(
        "SelfDistillation-snapshot",
        "loss",
        distilled(SnapshotTeacher, plain(MultiSimilarityLoss)),
        syncs_device=True,
        supports_cross_batch_memory=False,
        goes_in_distributed_wrapper=False,
        watches_a_network=True,
    ),
    Component(
        "SelfDistillation-EMA-CenterContrastiveLoss",
        "loss",
        distilled(EMATeacher, sized(CenterContrastiveLoss), decay=0.8),
        weights_samples=True,
        takes_references=False,
        supports_cross_batch_memory=False,
        goes_in_distributed_wrapper=False,
        cosine_only=True,
        regularizes_weights=True,
        watches_a_network=True,
    ),
    Component(
        "SelfDistillation-snapshot-interfered",
        "loss",
        distilled(SnapshotTeacher, interfered),
        syncs_device=True,
        supports_cross_batch_memory=False,
        goes_in_distributed_wrapper=False,
        hands_on_unit_vectors=True,
        watches_a_network=True,
        synced_buffers=(
            "loss.class_interference.class_means",
            "loss.class_interference.class_counts",
        ),
        without_draws={"strength": 0},
    ),
    Component(
        "ClassInterferenceRegularizer-attached",
        "loss",
        interfered,
        syncs_device=True,
        hands_on_unit_vectors=True,
        synced_buffers=("class_interference.class_means", "class_interference.class_counts"),
        without_draws={"strength": 0},
    ),
    Component(
        "ClassInterferenceRegularizer",
        "regularizer",
        interference,
        synced_buffers=("class_means", "class_counts"),
        without_draws={"strength": 0},
    ),
    Component("ContextualSimilarityMiner", "miner", plain(ContextualSimilarityMiner)),
    Component("ContextualKNN", "knn_func", plain(ContextualKNN, num_neighbors=5)),
]
