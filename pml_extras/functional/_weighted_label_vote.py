"""A weighted vote of references on the labels of samples."""

from typing import NamedTuple

import torch
from torch import Tensor

from ._kernels.precision import full_precision

TIE_TOLERANCE = 1e-5  # a fraction of the vote that rounding can explain


class WeightedLabelVote(NamedTuple):
    """The result of :func:`weighted_label_vote`, one value per sample."""

    vote_fraction: Tensor
    """(N,) in [0, 1], the fraction of the vote for the sample's own class; 0.5 without votes."""
    is_plurality: Tensor
    """(N,) bool, whether no other class gets more votes."""


@full_precision
def weighted_label_vote(weights: Tensor, labels: Tensor, ref_labels: Tensor) -> WeightedLabelVote:
    """Let references vote on the labels of samples.

    Args:
        weights: (N, R), the weight of each reference's vote on each sample; 0 means no vote.
        labels: (N,) integers.
        ref_labels: (R,) integers.

    Returns:
        A :class:`WeightedLabelVote`.

    Source: ours.

    Example:
        >>> import torch
        >>> weights = torch.tensor([[0.0, 0.6, 0.2], [0.6, 0.0, 0.0], [0.2, 0.0, 0.0]])
        >>> labels = torch.tensor([0, 0, 1])
        >>> weighted_label_vote(weights, labels, labels).vote_fraction
        tensor([0.7500, 1.0000, 0.0000])
    """
    classes, indices = torch.unique(torch.cat([labels, ref_labels]), return_inverse=True)
    target, ref_class = indices[: len(labels), None], indices[len(labels) :]
    votes = weights.new_zeros(len(weights), len(classes)).index_add_(1, ref_class, weights)
    target_votes, total = votes.gather(1, target).squeeze(1), votes.sum(1)
    return WeightedLabelVote(
        torch.where(total > 0, target_votes / total, 0.5),
        target_votes >= votes.amax(1) - TIE_TOLERANCE * total,
    )
