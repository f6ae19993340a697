"""The methods as functions on tensors. They need torch and SciPy, not pytorch-metric-learning."""

from ._center_contrastive import center_contrastive_loss
from ._class_interference import class_interference
from ._class_means import moving_class_means
from ._contextual import ContextualLossTerms, contextual_loss, contextual_similarity
from ._cosine import pairwise_cosine
from ._label_noise import LabelVote, label_vote
from ._listwise_kl import listwise_kl
from ._pair_mining import contextual_pairs
from ._reranking import ReferenceIndex, build_reference_index, contextual_rerank
from ._sharded_center_contrastive import sharded_center_contrastive_loss
from ._weighted_label_vote import WeightedLabelVote, weighted_label_vote

__all__ = [
    "center_contrastive_loss",
    "sharded_center_contrastive_loss",
    "contextual_similarity",
    "ContextualLossTerms",
    "contextual_loss",
    "class_interference",
    "moving_class_means",
    "listwise_kl",
    "contextual_pairs",
    "WeightedLabelVote",
    "weighted_label_vote",
    "LabelVote",
    "label_vote",
    "ReferenceIndex",
    "build_reference_index",
    "contextual_rerank",
    "pairwise_cosine",
]
