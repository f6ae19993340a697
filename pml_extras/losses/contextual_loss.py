"""Contextual loss (arXiv 2210.01908)."""

import warnings
from typing import Any

import torch
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.losses import BaseMetricLossFunction
from pytorch_metric_learning.utils import common_functions as c_f
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu
from torch import Tensor

from .. import _checks
from .._component import HyperparametersMixin, TensorLabelsMixin, element_losses
from ..functional import contextual_loss, contextual_similarity, pairwise_cosine
from ..functional._neighborhoods import knn_radii, squared_distances


class ContextualLoss(HyperparametersMixin, TensorLabelsMixin, BaseMetricLossFunction):
    r"""Trains samples of a class to share neighbors, and pulls them together.

    .. math:: L = \lambda L_\mathrm{context} + \beta L_\mathrm{contrast}
        + \gamma L_\mathrm{similarity}

    - :math:`L_\mathrm{context}`: the squared error of the contextual similarity, the overlap of two
      samples' neighborhoods, as a prediction of "same class".
    - :math:`L_\mathrm{contrast}`: penalizes positive pairs below ``pos_margin`` and negative pairs
      above ``neg_margin``, each by a mean over the active pairs, as in PML's ``ContrastiveLoss``.
    - :math:`L_\mathrm{similarity}`: the squared distance of the mean similarity from its target.

    The equations are in :func:`pml_extras.functional.contextual_loss`.

    Sample each class of a batch ``num_neighbors`` times or more (``MPerClassSampler``). In a
    smaller class, every sample has negatives among its neighbors, and the loss cannot reach 0. If
    ``avg_neighborhood_size`` in the log is near the batch size, lower ``neighborhood_slack``: the
    embeddings are too close together for it.

    With ``ref_emb``, neighbors are references: in a :class:`CrossBatchMemory` they come from the
    whole memory. References that equal a sample bit by bit are left out of its contextual error.

    The loss of a large batch with small neighborhoods and classes is computed with sparse matrices,
    with the same value and gradient; not with ``ref_emb``, and a miner's tuples still take (N, N)
    matrices. The sparse form cannot be differentiated twice; for that, use
    :func:`pml_extras.functional.contextual_loss` with ``implementation="reference"``.

    Args:
        num_neighbors: k >= 1, including the sample itself. Clamped to the batch or
            the references, with a warning.
        neighborhood_slack: eps >= 0, in units of squared distance between unit vectors.
        contextual_weight: :math:`\lambda` >= 0.
        contrastive_weight: :math:`\beta` >= 0; the authors use :math:`1 - \lambda - \gamma`.
        similarity_weight: :math:`\gamma` >= 0.
        pos_margin, neg_margin: in [-1, 1], cosine similarities.
        target_similarity: in [-1, 1], a cosine similarity.
        **kwargs: PML's ``reducer``, ``embedding_regularizer``, ``collect_stats``.

    Default distance: ``CosineSimilarity()``; no other is supported. Default reducer:
    ``MeanReducer``. Reducer input, one element per sample and weighted: **contextual_loss**,
    **contrastive_loss**, **similarity_loss** (the same for all samples). Tuples from a miner choose
    the pairs of the contrastive term; the other two terms need the whole batch.

    Statistics for the log: ``avg_neighborhood_size``, ``avg_pos_context`` and ``avg_neg_context``
    (mean contextual similarity of positive and negative pairs) and ``avg_similarity``. They cost a
    forward pass with dense (N, N) matrices.

    Raises:
        ValueError: without labels, with ``ref_emb`` but no ``ref_labels``, for embeddings that are
            not rows of floating-point numbers, or for a hyperparameter out of range.

    Source: arXiv 2210.01908 and its authors' code, whose settings for 256-pixel images are the
    defaults. Unlike theirs, all batches give finite values: N < k, k = 1, and neighborhoods of the
    whole batch too. References and the hand-derived gradients are ours.

    Example:
        >>> import torch
        >>> from pml_extras.losses import ContextualLoss
        >>> loss_func = ContextualLoss()
        >>> embeddings = torch.randn(32, 8, requires_grad=True)
        >>> labels = torch.arange(8).repeat_interleave(4)
        >>> loss_func(embeddings, labels).backward()
    """

    def __init__(
        self,
        *,
        num_neighbors: int = 4,
        neighborhood_slack: float = 0.05,
        contextual_weight: float = 0.4,
        contrastive_weight: float = 0.5,
        similarity_weight: float = 0.1,
        pos_margin: float = 0.75,
        neg_margin: float = 0.6,
        target_similarity: float = 0.25,
        **kwargs: Any,
    ) -> None:
        num_neighbors = _checks.count("num_neighbors", num_neighbors)
        _checks.non_negative(
            neighborhood_slack=neighborhood_slack,
            contextual_weight=contextual_weight,
            contrastive_weight=contrastive_weight,
            similarity_weight=similarity_weight,
        )
        _checks.in_range(-1, 1, pos_margin=pos_margin, neg_margin=neg_margin)
        _checks.in_range(-1, 1, target_similarity=target_similarity)
        super().__init__(**kwargs)
        c_f.assert_distance_type(self, CosineSimilarity, p=2, power=1)
        self.num_neighbors = num_neighbors
        self.neighborhood_slack = neighborhood_slack
        self.contextual_weight = contextual_weight
        self.contrastive_weight = contrastive_weight
        self.similarity_weight = similarity_weight
        self.pos_margin = pos_margin
        self.neg_margin = neg_margin
        self.target_similarity = target_similarity
        self.record("avg_neighborhood_size", "avg_pos_context", "avg_neg_context", "avg_similarity")
        self._checked_class_sizes = self._warned_of_clamping = False

    def compute_loss(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: tuple[Tensor, ...] | None,
        ref_emb: Tensor,
        ref_labels: Tensor,
    ) -> dict[str, dict[str, Any]]:
        c_f.labels_required(labels)
        _checks.embeddings(embeddings)
        _checks.embeddings(ref_emb, name="ref_emb")
        if ref_labels is None:
            raise ValueError("ref_labels are required with ref_emb")
        if len(embeddings) == 0 or len(ref_emb) == 0:
            return self.zero_losses()
        self._check_batch(ref_labels)
        within_batch = ref_emb is embeddings and ref_labels is labels
        weights = {
            "contextual": self.contextual_weight,
            "contrastive": self.contrastive_weight,
            "similarity": self.similarity_weight,
        }
        terms = contextual_loss(
            embeddings,
            labels,
            None if within_batch else ref_emb,
            None if within_batch else ref_labels,
            _pair_weights(labels, ref_labels, indices_tuple),
            num_neighbors=self.num_neighbors,
            slack=self.neighborhood_slack,
            pos_margin=self.pos_margin,
            neg_margin=self.neg_margin,
            target_similarity=self.target_similarity,
            terms=[name for name, weight in weights.items() if weight != 0],
        )
        if self.collect_stats:
            self._set_stats(embeddings, labels, None if within_batch else ref_emb, ref_labels)
        similarity = terms.similarity.expand(len(embeddings))
        return {
            "contextual_loss": element_losses(self.contextual_weight * terms.contextual),
            "contrastive_loss": element_losses(self.contrastive_weight * terms.contrastive),
            "similarity_loss": element_losses(self.similarity_weight * similarity),
        }

    def _check_batch(self, labels: Tensor) -> None:
        """Warn once if ``num_neighbors`` exceeds the references or the largest class."""
        k = self.num_neighbors
        if len(labels) < k:
            if not self._warned_of_clamping:
                self._warned_of_clamping = True
                warnings.warn(
                    f"num_neighbors={k} is clamped to {len(labels)} samples", stacklevel=6
                )
        elif not self._checked_class_sizes:  # once, because the host waits for a GPU
            self._checked_class_sizes = True
            largest_class = int(torch.unique(labels, return_counts=True)[1].max())
            if largest_class < k:
                warnings.warn(
                    f"num_neighbors={k} is more than the {largest_class} samples of the largest"
                    " class: negatives are always among the neighbors",
                    stacklevel=6,
                )

    @torch.no_grad()
    def _set_stats(
        self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor | None, ref_labels: Tensor
    ) -> None:
        k, slack = self.num_neighbors, self.neighborhood_slack
        similarities = pairwise_cosine(embeddings, ref_emb)
        distances = squared_distances(similarities)
        ref_distances = None if ref_emb is None else squared_distances(pairwise_cosine(ref_emb))
        context = contextual_similarity(distances, ref_distances, num_neighbors=k, slack=slack)
        radius, _ = knn_radii(distances, k, slack)
        positives, negatives = lmu.get_matches_and_diffs(labels, ref_labels)
        self.avg_neighborhood_size = (distances <= radius).sum(1).float().mean().item()
        self.avg_pos_context = _masked_mean(context, positives)
        self.avg_neg_context = _masked_mean(context, negatives)
        self.avg_similarity = similarities.mean().item()

    def get_default_distance(self) -> CosineSimilarity:
        return CosineSimilarity()

    def _sub_loss_names(self) -> list[str]:
        return ["contextual_loss", "contrastive_loss", "similarity_loss"]


def _pair_weights(
    labels: Tensor,
    ref_labels: Tensor,
    indices_tuple: tuple[Tensor, ...] | None,
) -> tuple[Tensor, Tensor] | None:
    """Two (N, R) tensors: how often a tuple has each pair as a positive and as a negative."""
    if indices_tuple is None:
        return None
    a1, p, a2, n = lmu.convert_to_pairs(indices_tuple, labels, ref_labels)

    def count(anchors: Tensor, others: Tensor) -> Tensor:
        counts = torch.zeros(len(labels), len(ref_labels), device=labels.device)
        return counts.index_put_((anchors, others), counts.new_ones(len(anchors)), accumulate=True)

    return count(a1, p), count(a2, n)


def _masked_mean(values: Tensor, mask: Tensor) -> float:
    mask = mask.bool()
    return (torch.where(mask, values, 0).sum() / mask.sum().clamp_min(1)).item()
