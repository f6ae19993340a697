"""The conformance table. A row here runs all conformance tests on a new component."""

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


def without_sizes(cls, **hyperparameters):
    """A factory for a class that needs neither the number of classes nor the embedding size."""
    return lambda num_classes, embedding_size, models, **kwargs: cls(**hyperparameters, **kwargs)


def with_sizes(cls, **hyperparameters):
    """A factory for a class that needs the number of classes and the embedding size."""
    return lambda num_classes, embedding_size, models, **kwargs: cls(
        num_classes, embedding_size, **hyperparameters, **kwargs
    )


def class_interference(num_classes, embedding_size, models, strength=0.3, **kwargs):
    generator = torch.Generator().manual_seed(5)
    return ClassInterferenceRegularizer(
        num_classes, embedding_size, strength=strength, generator=generator, **kwargs
    )


def loss_with_interference(
    num_classes, embedding_size, models, strength=0.3, collect_stats=None, **kwargs
):
    regularizer = class_interference(
        num_classes, embedding_size, models, strength, collect_stats=collect_stats
    )
    return regularizer.attach(MultiSimilarityLoss(collect_stats=collect_stats, **kwargs))


def contextual_loss_with_memory(num_classes, embedding_size, models, collect_stats=None, **kwargs):
    loss = ContextualLoss(collect_stats=collect_stats, **kwargs)
    return CrossBatchMemory(loss, embedding_size, memory_size=60, collect_stats=collect_stats)


class TrainedNetwork(nn.Linear):
    """A network that a teacher observes, for inputs of any dtype on any device."""

    def __init__(self, size):
        super().__init__(size, size, bias=False)
        nn.init.eye_(self.weight)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x))


def self_distillation(teacher_type, make_loss, **hyperparameters):
    def factory(num_classes, embedding_size, models, collect_stats=None, **kwargs):
        loss = make_loss(num_classes, embedding_size, None, collect_stats=collect_stats, **kwargs)
        networks = models or [TrainedNetwork(embedding_size)]
        teacher = teacher_type(*networks, **hyperparameters)
        loss_func = SelfDistillation(loss, teacher, num_epochs=4, collect_stats=collect_stats)
        if models is None:  # after one epoch, with a network that differs from the teacher
            teacher._learn()
            loss_func.end_epoch()
            with torch.no_grad():
                networks[0].weight += 0.3
        return loss_func

    return factory


COMPONENTS = [
    Component(
        "CenterContrastiveLoss",
        "loss",
        with_sizes(CenterContrastiveLoss),
        weights_samples=True,
        takes_references=False,
        supports_cross_batch_memory=False,
        cosine_only=True,
        supports_weight_regularizer=True,
    ),
    Component(
        "CenterContrastiveLoss-ema",
        "loss",
        with_sizes(CenterContrastiveLoss, center_update="ema"),
        weights_samples=True,
        takes_references=False,
        supports_cross_batch_memory=False,
        cosine_only=True,
        synced_buffers=("centers", "class_counts"),
    ),
    Component("ContextualLoss", "loss", without_sizes(ContextualLoss), cosine_only=True),
    Component(
        "ListwiseDistillationLoss",
        "loss",
        without_sizes(ListwiseDistillationLoss),
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
        contextual_loss_with_memory,
        syncs_device=True,
        takes_references=False,
        supports_cross_batch_memory=False,
        cosine_only=True,
        keeps_dtypes=False,  # PML's memory takes the dtype of the latest batch
    ),
    Component(
        "SelfDistillation-snapshot",
        "loss",
        self_distillation(SnapshotTeacher, without_sizes(MultiSimilarityLoss)),
        syncs_device=True,
        supports_cross_batch_memory=False,
        supports_distributed_wrapper=False,
        observes_network=True,
    ),
    Component(
        "SelfDistillation-EMA-CenterContrastiveLoss",
        "loss",
        self_distillation(EMATeacher, with_sizes(CenterContrastiveLoss), decay=0.8),
        weights_samples=True,
        takes_references=False,
        supports_cross_batch_memory=False,
        supports_distributed_wrapper=False,
        cosine_only=True,
        supports_weight_regularizer=True,
        observes_network=True,
    ),
    Component(
        "SelfDistillation-snapshot-ClassInterferenceRegularizer",
        "loss",
        self_distillation(SnapshotTeacher, loss_with_interference),
        syncs_device=True,
        supports_cross_batch_memory=False,
        supports_distributed_wrapper=False,
        normalizes_before_regularizer=True,
        observes_network=True,
        synced_buffers=(
            "loss.class_interference.class_means",
            "loss.class_interference.class_counts",
        ),
        without_randomness={"strength": 0},
    ),
    Component(
        "ClassInterferenceRegularizer-attached",
        "loss",
        loss_with_interference,
        syncs_device=True,
        normalizes_before_regularizer=True,
        synced_buffers=("class_interference.class_means", "class_interference.class_counts"),
        without_randomness={"strength": 0},
    ),
    Component(
        "ClassInterferenceRegularizer",
        "regularizer",
        class_interference,
        synced_buffers=("class_means", "class_counts"),
        without_randomness={"strength": 0},
    ),
    Component("ContextualSimilarityMiner", "miner", without_sizes(ContextualSimilarityMiner)),
    Component("ContextualKNN", "knn_func", without_sizes(ContextualKNN, num_neighbors=5)),
]
