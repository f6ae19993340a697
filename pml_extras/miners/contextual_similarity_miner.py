"""A pair miner that looks at contexts instead of distances alone."""

from __future__ import annotations

from typing import Any

from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.miners import BaseMiner
from torch import Tensor

from .._component import HyperparametersMixin, check_count, require
from ..functional import contextual_pairs
from ..functional._precision import full_precision


class ContextualSimilarityMiner(HyperparametersMixin, BaseMiner):
    """Mines pairs that are hard by context, and leaves out those whose labels look wrong.

    Contextual similarity S says how far two samples share neighbours. A positive pair is hard if it
    shares less context than the anchor does with some negative, give or take the margin; a negative
    pair the other way round. The neighbours also vote on each sample's label, weighted by S:
    positive pairs with an outvoted sample, and negative pairs that share more context than their
    own classes give them, are probably mislabelled and left out. See
    :func:`pml_extras.functional.contextual_pairs` for the rules.

    Args:
        num_neighbors: k >= 1, the sample itself included; clamped to the number of references.
        margin: in units of S, which lies in [0, 1]; larger keeps easier pairs.
        filter_noise: whether to leave out probably mislabelled pairs. With clean labels that drops
            some legitimately hard ones too, and of a network that is not trained yet, whose
            neighbours know nothing, nearly all: train without the miner first.
        **kwargs: PML's ``distance`` and ``collect_stats``.

    Default distance: ``CosineSimilarity()``; every PML distance works, because only the order of
    the distances counts. Returns pairs: (anchors, positives, anchors, negatives). With ``ref_emb``,
    neighbours are references, and exact copies of an anchor among them count as the anchor itself.

    Statistics for the log: PML's ``num_pos_pairs`` and ``num_neg_pairs``.

    Raises:
        ValueError: for a setting out of range.

    Source: ours, on the contextual similarity of arXiv 2210.01908.

    Example:
        >>> import torch
        >>> from pytorch_metric_learning.losses import ContrastiveLoss
        >>> from pml_extras.miners import ContextualSimilarityMiner
        >>> embeddings, labels = torch.randn(32, 8), torch.arange(32) % 8
        >>> pairs = ContextualSimilarityMiner()(embeddings, labels)
        >>> loss = ContrastiveLoss()(embeddings, labels, pairs)
    """

    hyperparameters = ("num_neighbors", "margin", "filter_noise")

    def __init__(
        self,
        *,
        num_neighbors: int = 4,
        margin: float = 0.1,
        filter_noise: bool = True,
        **kwargs: Any,
    ) -> None:
        check_count("num_neighbors", num_neighbors)
        require(margin >= 0, "margin", "not be negative", margin)
        super().__init__(**kwargs)
        self.num_neighbors = num_neighbors
        self.margin = margin
        self.filter_noise = filter_noise
        self.add_to_recordable_attributes(list_of_names=list(self.hyperparameters))

    @full_precision
    def mine(
        self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        within = ref_emb is embeddings and ref_labels is labels
        return contextual_pairs(
            embeddings,
            labels,
            None if within else ref_emb,
            None if within else ref_labels,
            self.num_neighbors,
            self.margin,
            self.filter_noise,
            self.distances,
        )

    def distances(self, embeddings: Tensor, ref_emb: Tensor) -> Tensor:
        """(N, R), smaller is nearer."""
        matrix = self.distance(embeddings, ref_emb)
        return -matrix if self.distance.is_inverted else matrix

    def get_default_distance(self) -> CosineSimilarity:
        return CosineSimilarity()
