"""Losses, used as PML's own."""

from .center_contrastive_loss import CenterContrastiveLoss
from .contextual_loss import ContextualLoss
from .listwise_distillation_loss import ListwiseDistillationLoss
from .sharded_center_contrastive_loss import ShardedCenterContrastiveLoss
from .wrappers import CrossBatchMemory, SelfSupervisedLoss

__all__ = [
    "CenterContrastiveLoss",
    "ShardedCenterContrastiveLoss",
    "ContextualLoss",
    "ListwiseDistillationLoss",
    "CrossBatchMemory",
    "SelfSupervisedLoss",
]
