"""Hard pairs by contextual similarity, without those whose labels look wrong."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._precision import full_precision
from .contextual_similarity import contextual_similarity_from_distances

# A positive pair this similar in context is kept whatever the labels around it say.
SURE_POSITIVE = 0.25


class ClassVote(NamedTuple):
    """What a sample's context says of its label: one value a sample."""

    share: Tensor
    """Its class's share of the contextual similarity around it, in [0, 1]; 0.5 if there is none."""
    trusted: Tensor
    """Bool: no other class has a larger share."""


def class_vote(context: Tensor, labels: Tensor, ref_labels: Tensor, excluded: Tensor) -> ClassVote:
    """Let the references vote on each sample's label, weighted by contextual similarity.

    Args:
        context: (N, R) contextual similarities.
        labels: (N,).
        ref_labels: (R,).
        excluded: (N, R) bool, who does not vote on whom: the sample itself.

    Example:
        >>> import torch
        >>> context = torch.tensor([[1.0, 0.6, 0.2], [0.6, 1.0, 0.0], [0.2, 0.0, 1.0]])
        >>> labels = torch.tensor([0, 0, 1])
        >>> class_vote(context, labels, labels, torch.eye(3, dtype=torch.bool))
        ClassVote(share=tensor([0.7500, 1.0000, 0.0000]), trusted=tensor([ True,  True, False]))
    """
    classes, numbers = torch.unique(torch.cat([labels, ref_labels]), return_inverse=True)
    own_class, ref_class = numbers[: len(labels), None], numbers[len(labels) :]
    votes = context.new_zeros(len(context), len(classes))
    votes.index_add_(1, ref_class, context.masked_fill(excluded, 0))
    own, total = votes.gather(1, own_class).squeeze(1), votes.sum(1)
    strongest_other = votes.scatter(1, own_class, 0).amax(1)
    share = torch.where(total > 0, own / total, 0.5)
    return ClassVote(share, own >= strongest_other)


@full_precision
def contextual_pairs(
    distances: Tensor,
    labels: Tensor,
    ref_distances: Tensor | None = None,
    ref_labels: Tensor | None = None,
    copies: Tensor | None = None,
    num_neighbors: int = 4,
    margin: float = 0.1,
    filter_noise: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""Positive and negative pairs that are hard by context and probably labelled right.

    With S the contextual similarity (slack 0, so that only the order of the distances counts) and
    v the share of a sample's own class in its :func:`class_vote`:

    - a positive pair is kept if both samples are trusted, or if :math:`S_{ij} > 0.25`;
    - a negative pair is kept unless :math:`S_{ij} > \min(v_i, v_j)`;
    - an anchor that would be left without any pair keeps them all;
    - of the kept pairs, a positive is hard if S is below that of the anchor's most similar negative
      plus the margin, a negative if S is above that of its least similar positive minus the margin;
    - where S is 0 it cannot tell, and the distance decides: a positive must be farther than the
      anchor's nearest negative, a negative nearer than its farthest positive, and both samples
      trusted, because a wrong label is wrong about distances too.

    Args:
        distances: (N, N) within a batch, smaller is nearer; or (Q, R) from anchors to references,
            with ``ref_distances``.
        labels: (N,) or (Q,).
        ref_distances: (R, R) between the references.
        ref_labels: (R,).
        copies: (Q, R) bool, the references that are the anchor itself: no pairs, no votes.
        num_neighbors: k >= 1 of the contextual similarity, the sample itself included.
        margin: in units of S; larger keeps easier pairs.
        filter_noise: whether to leave out pairs whose labels look wrong.

    Returns:
        Anchors and positives, anchors and negatives: four long tensors, as PML's pair miners.

    Source: ours, on the contextual similarity of arXiv 2210.01908.

    Example:
        >>> import torch
        >>> x = torch.tensor([0.0, 1.0, 3.5, 5.0])
        >>> distances, labels = (x[:, None] - x).abs(), torch.tensor([0, 0, 1, 1])
        >>> contextual_pairs(distances, labels, num_neighbors=2, filter_noise=False, margin=1.1)[:2]
        (tensor([0, 1, 2, 3]), tensor([1, 0, 3, 2]))
    """
    # A sample that is not finite has no place in any order: it is nobody's neighbour.
    inf = float("inf")
    broken = ~distances.isfinite()
    far = torch.finfo(distances.dtype).max  # not infinity, which less itself is NaN
    distances = distances.masked_fill(broken, far)
    if ref_distances is not None:
        ref_distances = ref_distances.masked_fill(~ref_distances.isfinite(), far)
    if ref_distances is None or ref_labels is None or copies is None:
        context = contextual_similarity_from_distances(distances, num_neighbors)
        ref_labels = labels
        copies = torch.eye(len(labels), dtype=torch.bool, device=labels.device) | broken
        vote = ref_vote = class_vote(context, labels, labels, copies)
    else:
        context = contextual_similarity_from_distances(
            distances, num_neighbors, ref_distances=ref_distances
        )
        ref_context = contextual_similarity_from_distances(ref_distances, num_neighbors)
        copies = copies | broken
        itself = torch.eye(len(ref_labels), dtype=torch.bool, device=labels.device)
        vote = class_vote(context, labels, ref_labels, copies)
        ref_vote = class_vote(ref_context, ref_labels, ref_labels, itself)

    same_class = labels[:, None] == ref_labels
    positives, negatives = same_class & ~copies, ~same_class & ~copies
    distance_decides = context == 0
    if filter_noise:
        both_trusted = vote.trusted[:, None] & ref_vote.trusted
        likely = torch.where(
            same_class,
            both_trusted | (context > SURE_POSITIVE),
            context <= torch.minimum(vote.share[:, None], ref_vote.share),
        )
        left_without = ~((positives | negatives) & likely).any(1, keepdim=True)
        positives = positives & (likely | left_without)
        negatives = negatives & (likely | left_without)
        distance_decides &= both_trusted | left_without

    nearest_negative = distances.masked_fill(~negatives, inf).amin(1, keepdim=True)
    farthest_positive = distances.masked_fill(~positives, -inf).amax(1, keepdim=True)
    most_similar_negative = context.masked_fill(~negatives, -inf).amax(1, keepdim=True)
    least_similar_positive = context.masked_fill(~positives, inf).amin(1, keepdim=True)
    hard_positives = (
        positives
        & (context < most_similar_negative + margin)
        & ((context > 0) | (distance_decides & (distances > nearest_negative)))
    )
    hard_negatives = (
        negatives
        & (context > least_similar_positive - margin)
        & ((context > 0) | (distance_decides & (distances < farthest_positive)))
    )
    a1, p = hard_positives.nonzero(as_tuple=True)
    a2, n = hard_negatives.nonzero(as_tuple=True)
    return a1, p, a2, n
