"""Losses, used as PML's own."""

from .center_contrastive_loss import CenterContrastiveLoss
from .contextual_loss import ContextualLoss
from .listwise_distillation_loss import ListwiseDistillationLoss
from .wrappers import CrossBatchMemory, SelfSupervisedLoss

__all__ = [
    "CenterContrastiveLoss",
    "ContextualLoss",
    "ListwiseDistillationLoss",
    "CrossBatchMemory",
    "SelfSupervisedLoss",
]
