"""Contextual loss (arXiv 2210.01908)."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.losses import BaseMetricLossFunction
from pytorch_metric_learning.utils import common_functions as c_f
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu
from torch import Tensor

from .._component import HyperparametersMixin, check_count, check_embeddings, require
from ..functional import (
    contextual_loss,
    contextual_similarity,
    contrastive_loss,
    mean_similarity_loss,
    pairwise_cosine,
    sparse_contextual_loss,
    sparse_contrastive_loss,
    sparse_pays,
)
from ..functional.contextual_similarity import neighborhood_mask
from ..functional.copies import exact_copies


class ContextualLoss(HyperparametersMixin, BaseMetricLossFunction):
    r"""Makes the neighbourhoods of a class agree, beside pulling its members together.

    .. math:: L = \lambda L_\mathrm{context} + \beta L_\mathrm{contrast}
        + \gamma L_\mathrm{similarity}

    - :math:`L_\mathrm{context}`: squared error of the contextual similarity, which says how far two
      samples share neighbours, as a prediction of "same class"
      (:func:`pml_extras.functional.contextual_loss`);
    - :math:`L_\mathrm{contrast}`: positive pairs above ``pos_margin``, negative pairs below
      ``neg_margin``, each a mean over the active pairs: PML's ``ContrastiveLoss``;
    - :math:`L_\mathrm{similarity}`: squared distance of the mean similarity from its target.

    Sample every class of a batch ``num_neighbors`` times or more (``MPerClassSampler``): a sample
    with fewer positives must have strangers among its neighbours, and the loss cannot reach zero.
    If the log shows neighbourhoods as large as the batch, the embeddings are too concentrated for
    the slack: lower it.

    With ``ref_emb``, neighbours are references: in a :class:`CrossBatchMemory` the whole memory is
    the context. References that equal a sample to the last bit count as the sample itself.

    Large batches with small neighbourhoods and classes take a sparse way to the same loss and
    gradient; that and the dense way within a batch cannot be differentiated twice.

    Args:
        num_neighbors: k >= 1, the sample itself included. Clamped to the batch, with a warning.
        neighborhood_slack: eps >= 0, in units of squared distance between unit vectors.
        contextual_weight: :math:`\lambda` >= 0.
        contrastive_weight: :math:`\beta` >= 0; the authors' is :math:`1 - \lambda - \gamma`.
        similarity_weight: :math:`\gamma` >= 0.
        pos_margin, neg_margin: in [-1, 1], cosine similarities.
        target_similarity: in [-1, 1].
        **kwargs: PML's ``reducer``, ``embedding_regularizer``, ``collect_stats``.

    Default distance: ``CosineSimilarity()``, the only one. Default reducer: ``MeanReducer``.
    Reducer input, each an element a sample and weighted: **contextual_loss**, **contrastive_loss**,
    **similarity_loss** (the same for all samples). Tuples from a miner choose the pairs of the
    contrastive term; the other two need the whole batch. Statistics for the log:
    ``avg_neighborhood_size``, ``avg_pos_context`` and ``avg_neg_context`` (mean contextual
    similarity of positive and negative pairs) and ``avg_similarity``. They are of the whole (N, N)
    matrices, so ``collect_stats`` costs about another forward pass and their memory.

    Raises:
        ValueError: without labels, with ``ref_emb`` but no ``ref_labels``, for embeddings that are
            no rows of floating-point numbers, or for a setting out of range.

    Source: arXiv 2210.01908 and its authors' code, whose settings for 256-pixel images are the
    defaults. Unlike there, all batches give finite values: N < k, k = 1, and neighbourhoods of the
    whole batch too. References and the closed form of the gradient are ours.

    Example:
        >>> import torch
        >>> from pml_extras.losses import ContextualLoss
        >>> loss_func = ContextualLoss()
        >>> embeddings = torch.randn(32, 8, requires_grad=True)
        >>> labels = torch.arange(8).repeat_interleave(4)
        >>> loss_func(embeddings, labels).backward()
    """

    hyperparameters = (
        "num_neighbors",
        "neighborhood_slack",
        "contextual_weight",
        "contrastive_weight",
        "similarity_weight",
        "pos_margin",
        "neg_margin",
        "target_similarity",
    )

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
        check_count("num_neighbors", num_neighbors)
        for name, value in {
            "neighborhood_slack": neighborhood_slack,
            "contextual_weight": contextual_weight,
            "contrastive_weight": contrastive_weight,
            "similarity_weight": similarity_weight,
        }.items():
            require(0 <= value < math.inf, name, "not be negative", value)
        for name, value in {
            "pos_margin": pos_margin,
            "neg_margin": neg_margin,
            "target_similarity": target_similarity,
        }.items():
            require(-1 <= value <= 1, name, "lie in [-1, 1]", value)
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
        self.add_to_recordable_attributes(list_of_names=list(self.hyperparameters))
        self.add_to_recordable_attributes(
            list_of_names=[
                "avg_neighborhood_size",
                "avg_pos_context",
                "avg_neg_context",
                "avg_similarity",
            ],
            is_stat=True,
        )
        self._seen_batch = self._warned_of_clamping = False

    def compute_loss(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: tuple[Tensor, ...] | None,
        ref_emb: Tensor,
        ref_labels: Tensor,
    ) -> dict[str, dict[str, Any]]:
        c_f.labels_required(labels)
        check_embeddings(embeddings)
        check_embeddings(ref_emb, name="ref_emb")
        if ref_labels is None:
            raise ValueError("ref_labels are required with ref_emb")
        if len(embeddings) == 0 or len(ref_emb) == 0:
            return self.zero_losses()
        self.check_batch(ref_labels)
        to_self = ref_emb is embeddings and ref_labels is labels
        k, slack = self.num_neighbors, self.neighborhood_slack
        is_sparse = to_self and sparse_pays(embeddings, labels, k, slack)
        if is_sparse:
            context_losses = sparse_contextual_loss(embeddings, labels, k, slack)
        if is_sparse and indices_tuple is None:
            contrast_losses = sparse_contrastive_loss(
                embeddings, labels, self.pos_margin, self.neg_margin
            )
        else:
            similarities = pairwise_cosine(embeddings, None if to_self else ref_emb)
            positives, negatives = _pair_weights(similarities, labels, ref_labels, indices_tuple)
            contrast_losses = contrastive_loss(
                similarities, positives, negatives, self.pos_margin, self.neg_margin
            )
        if not is_sparse:
            references = (
                (None, None, None)
                if to_self
                else (pairwise_cosine(ref_emb), ref_labels, exact_copies(embeddings, ref_emb))
            )
            context_losses = contextual_loss(similarities, labels, k, slack, *references)
        if self.collect_stats:
            self.set_stats(embeddings, labels, None if to_self else ref_emb, ref_labels)
        sub_losses = {
            "contextual_loss": self.contextual_weight * context_losses,
            "contrastive_loss": self.contrastive_weight * contrast_losses,
            "similarity_loss": self.similarity_weight
            * mean_similarity_loss(
                embeddings, self.target_similarity, None if to_self else ref_emb
            ).expand(len(embeddings)),
        }
        return {
            name: {
                "losses": losses,
                "indices": c_f.torch_arange_from_size(embeddings),
                "reduction_type": "element",
            }
            for name, losses in sub_losses.items()
        }

    def check_batch(self, labels: Tensor) -> None:
        """Warn, once, of batches that the number of neighbours does not suit."""
        k = self.num_neighbors
        if len(labels) < k and not self._warned_of_clamping:
            self._warned_of_clamping = True
            warnings.warn(
                f"num_neighbors={k} is clamped: the batch holds {len(labels)}", stacklevel=2
            )
        elif not self._seen_batch:  # once, because on a GPU the host waits for the answer
            largest_class = int(torch.unique(labels, return_counts=True)[1].max())
            if largest_class < k:
                warnings.warn(
                    f"num_neighbors={k} is more than the {largest_class} samples that a class has"
                    " in this batch: strangers must be among the neighbours",
                    stacklevel=2,
                )
        self._seen_batch = True

    @torch.no_grad()
    def set_stats(
        self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor | None, ref_labels: Tensor
    ) -> None:
        k, slack = self.num_neighbors, self.neighborhood_slack
        similarities = pairwise_cosine(embeddings, ref_emb)
        context = contextual_similarity(
            similarities, k, slack, None if ref_emb is None else pairwise_cosine(ref_emb)
        )
        near = neighborhood_mask((2 - 2 * similarities).clamp_min(0), k, slack)
        positives, negatives = lmu.get_matches_and_diffs(labels, ref_labels)
        self.avg_neighborhood_size = near.sum(1).float().mean().item()
        self.avg_pos_context = _mean_where(positives.bool(), context)
        self.avg_neg_context = _mean_where(negatives.bool(), context)
        self.avg_similarity = similarities.mean().item()

    def get_default_distance(self) -> CosineSimilarity:
        return CosineSimilarity()

    def _sub_loss_names(self) -> list[str]:
        return ["contextual_loss", "contrastive_loss", "similarity_loss"]


def _pair_weights(
    similarities: Tensor,
    labels: Tensor,
    ref_labels: Tensor,
    indices_tuple: tuple[Tensor, ...] | None,
) -> tuple[Tensor, Tensor]:
    """(N, R) twice: how many times each pair is to count as a positive, and as a negative, one."""
    if indices_tuple is None:
        return lmu.get_matches_and_diffs(labels, ref_labels)
    a1, p, a2, n = lmu.convert_to_pairs(indices_tuple, labels, ref_labels)

    def count(anchors: Tensor, others: Tensor) -> Tensor:
        ones = similarities.new_ones(len(anchors))
        return torch.zeros_like(similarities).index_put_((anchors, others), ones, accumulate=True)

    return count(a1, p), count(a2, n)


def _mean_where(mask: Tensor, values: Tensor) -> float:
    return (torch.where(mask, values, 0).sum() / mask.sum().clamp_min(1)).item()
