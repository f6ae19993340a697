"""Nearest-neighbor search at test time, called as PML's own."""

from .contextual_knn import ContextualKNN

__all__ = ["ContextualKNN"]
