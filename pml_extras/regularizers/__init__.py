"""Regularizers of embeddings."""

from .class_interference_regularizer import ClassInterferenceRegularizer

__all__ = ["ClassInterferenceRegularizer"]
