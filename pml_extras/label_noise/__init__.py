"""Detection of wrong labels in a training set."""

from .label_noise_detector import LabelNoiseDetector

__all__ = ["LabelNoiseDetector"]
