"""A pair miner that uses contextual similarity in addition to distances."""

from typing import Any

from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.miners import BaseMiner
from torch import Tensor

from .. import _checks
from .._component import HyperparametersMixin, TensorLabelsMixin
from ..functional import contextual_pairs


class ContextualSimilarityMiner(HyperparametersMixin, TensorLabelsMixin, BaseMiner):
    """Mines pairs that are hard by context, and drops pairs that are probably mislabeled.

    Contextual similarity S measures the overlap of two samples' neighborhoods. A positive pair is
    hard if its S is below that of the anchor's most similar negative plus a margin; a negative pair
    if its S is above that of the least similar positive minus the margin. The neighbors also vote
    on each sample's label, weighted by S. A positive pair is dropped if one of its samples is
    outvoted and its S is at most 0.25. A negative pair is dropped if its S exceeds the smaller of
    the fractions of the vote for its samples' own classes. An anchor that would lose all its pairs
    keeps them. Where S is 0, the order of the distances must agree as well. See
    :func:`pml_extras.functional.contextual_pairs` for the rules.

    Args:
        num_neighbors: k >= 1, including the sample itself; clamped to the number of references.
        margin: >= 0, in units of S, which lies in [0, 1]. Larger keeps easier pairs.
        filter_noise: whether to drop probably mislabeled pairs. With clean labels it drops some
            hard pairs too. With an untrained network, whose neighbors say little, it drops nearly
            all: train without the miner first.
        **kwargs: PML's ``distance`` and ``collect_stats``.

    Default distance: ``CosineSimilarity()``. Every PML distance works, because only the order of
    the distances counts. Returns pairs: (anchors, positives, anchors, negatives). With ``ref_emb``,
    neighbors are references, and exact copies of an anchor among them count as the anchor itself.

    Statistics for the log: PML's ``num_pos_pairs`` and ``num_neg_pairs``.

    Raises:
        ValueError: for a hyperparameter out of range.

    Source: ours, based on the contextual similarity of arXiv 2210.01908.

    Example:
        >>> import torch
        >>> from pytorch_metric_learning.losses import ContrastiveLoss
        >>> from pml_extras.miners import ContextualSimilarityMiner
        >>> embeddings, labels = torch.randn(32, 8), torch.arange(32) % 8
        >>> pairs = ContextualSimilarityMiner()(embeddings, labels)
        >>> loss = ContrastiveLoss()(embeddings, labels, pairs)
    """

    def __init__(
        self,
        *,
        num_neighbors: int = 4,
        margin: float = 0.1,
        filter_noise: bool = True,
        **kwargs: Any,
    ) -> None:
        num_neighbors = _checks.count("num_neighbors", num_neighbors)
        _checks.non_negative(margin=margin)
        super().__init__(**kwargs)
        self.num_neighbors = num_neighbors
        self.margin = margin
        self.filter_noise = filter_noise
        self.record()

    def mine(
        self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        within_batch = ref_emb is embeddings and ref_labels is labels
        return contextual_pairs(
            embeddings,
            labels,
            None if within_batch else ref_emb,
            None if within_batch else ref_labels,
            num_neighbors=self.num_neighbors,
            margin=self.margin,
            filter_noise=self.filter_noise,
            distance=self._distances,
        )

    def _distances(self, embeddings: Tensor, ref_emb: Tensor) -> Tensor:
        """(N, R), smaller is nearer."""
        matrix = self.distance(embeddings, ref_emb)
        return -matrix if self.distance.is_inverted else matrix

    def get_default_distance(self) -> CosineSimilarity:
        return CosineSimilarity()
