"""Inference, used as PML's own, and what embeddings tell of their labels."""

from .contextual_knn import ContextualKNN
from .label_trust import LabelTrust

__all__ = ["ContextualKNN", "LabelTrust"]
