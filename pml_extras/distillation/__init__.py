"""Self-distillation: the network in training learns from an earlier self."""

from .self_distillation import SelfDistillation
from .teacher import EMATeacher, SnapshotTeacher, Teacher

__all__ = ["SelfDistillation", "SnapshotTeacher", "EMATeacher", "Teacher"]
