"""The mathematics of the methods: pure functions on tensors, which need torch alone."""

from ._label_noise import LabelVote, WeightedLabelVote, label_vote, weighted_label_vote
from ._reranking import ReferenceIndex, build_reference_index, contextual_rerank
from .center_contrastive_loss import center_contrastive_loss
from .class_interference import class_interference
from .class_means import moving_class_means
from .contextual_loss import contextual_loss, contrastive_loss, mean_similarity_loss
from .contextual_pairs import contextual_pairs
from .contextual_similarity import contextual_similarity, contextual_similarity_from_distances
from .cosine import pairwise_cosine
from .listwise_kl import listwise_kl
from .sharded_center_contrastive_loss import sharded_center_contrastive_loss
from .sparse_contextual_loss import sparse_contextual_loss, sparse_pays
from .sparse_contrastive_loss import sparse_contrastive_loss

__all__ = [
    "center_contrastive_loss",
    "sharded_center_contrastive_loss",
    "contextual_similarity",
    "contextual_similarity_from_distances",
    "contextual_loss",
    "sparse_contextual_loss",
    "sparse_pays",
    "contrastive_loss",
    "sparse_contrastive_loss",
    "mean_similarity_loss",
    "class_interference",
    "moving_class_means",
    "listwise_kl",
    "WeightedLabelVote",
    "weighted_label_vote",
    "LabelVote",
    "label_vote",
    "contextual_pairs",
    "ReferenceIndex",
    "contextual_rerank",
    "build_reference_index",
    "pairwise_cosine",
]
