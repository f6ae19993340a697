"""Inference, used as PML's own."""

from .contextual_knn import ContextualKNN

__all__ = ["ContextualKNN"]
