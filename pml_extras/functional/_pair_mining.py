"""Mining of pairs that are hard by contextual similarity and probably labeled right."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from ._contextual import contextual_similarity, contextual_similarity_matrix
from ._cosine import pairwise_cosine
from ._kernels.precision import full_precision
from ._kernels.self_matches import self_match_mask
from ._weighted_label_vote import weighted_label_vote

SURE_POSITIVE = 0.25  # a positive pair with more contextual similarity is kept whatever the vote


@full_precision
@torch.no_grad()
def contextual_pairs(
    embeddings: Tensor,
    labels: Tensor,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    *,
    num_neighbors: int = 4,
    margin: float = 0.1,
    filter_noise: bool = True,
    distance: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""Positive and negative pairs that are hard by context and probably labeled right.

    S is the contextual similarity without slack, so only the order of the distances counts. v is
    the fraction of the neighbors' vote for a sample's own class (:func:`weighted_label_vote`). A
    sample is probably clean if no other class gets more votes.

    - A positive pair is kept if both samples are probably clean, or if :math:`S_{ij} > 0.25`.
    - A negative pair is kept unless :math:`S_{ij} > \min(v_i, v_j)`.
    - An anchor that would have no pair keeps all its pairs.
    - A kept positive is hard if S is below that of the anchor's most similar negative plus the
      margin. A kept negative is hard if S is above that of the anchor's least similar positive
      minus the margin.
    - Where S is 0 the distance must agree as well: a positive must be farther than the anchor's
      nearest negative, a negative nearer than its farthest positive. With ``filter_noise``,
      both samples must be probably clean, because distances to a mislabeled sample mislead too;
      an anchor that kept all its pairs is exempt.

    Args:
        embeddings: (N, D), the anchors.
        labels: (N,).
        ref_emb: (R, D), the samples that the anchors are paired with, and among which all neighbors
            are found. Default: the anchors themselves. A reference that equals an anchor bit by
            bit is that anchor: it forms no pair with it and has no vote on it.
        ref_labels: (R,), required with ``ref_emb``.
        num_neighbors: k >= 1 of the contextual similarity, including the sample itself.
        margin: in units of S. Larger keeps easier pairs.
        filter_noise: whether to drop pairs that are probably mislabeled.
        distance: from (B, D) and (R, D) embeddings to (B, R) distances, smaller is nearer. Default:
            the negative cosine similarity.

    Returns:
        Four int64 tensors like those of PML's pair miners: anchors and positives, anchors and
        negatives.

    Source: ours, based on the contextual similarity of arXiv 2210.01908.

    Example:
        >>> import torch
        >>> from pml_extras.functional import contextual_pairs
        >>> x, labels = torch.tensor([[0.0], [1.0], [3.5], [5.0]]), torch.tensor([0, 0, 1, 1])
        >>> rules = {"num_neighbors": 2, "filter_noise": False, "margin": 1.1}
        >>> contextual_pairs(x, labels, distance=torch.cdist, **rules)[:2]
        (tensor([0, 1, 2, 3]), tensor([1, 0, 3, 2]))
    """
    if (ref_emb is None) != (ref_labels is None):
        raise ValueError("ref_emb and ref_labels are required together")
    if len(embeddings) == 0 or (ref_emb is not None and len(ref_emb) == 0):
        empty = labels.new_empty(4, 0, dtype=torch.long)
        return empty[0], empty[1], empty[2], empty[3]
    # A sample that is not finite is nobody's neighbor. Its distance is the largest finite number,
    # because inf - inf is NaN.
    farthest = torch.finfo(embeddings.dtype).max

    def distances_between(x: Tensor, y: Tensor) -> Tensor:
        found = -pairwise_cosine(x, y) if distance is None else distance(x, y)
        return found.to(embeddings.dtype).masked_fill(~found.isfinite(), farthest)

    ref_context = None
    if ref_emb is None or ref_labels is None:
        ref_labels = labels
        distances = distances_between(embeddings, embeddings)
        context = contextual_similarity_matrix(
            distances.__getitem__, embeddings, num_neighbors=num_neighbors
        ).to_dense()
        is_self = torch.eye(len(embeddings), dtype=torch.bool, device=embeddings.device)
    else:
        similarity = functools.partial(
            contextual_similarity, num_neighbors=num_neighbors, slack=0.0
        )
        ref_distances = distances_between(ref_emb, ref_emb)
        ref_context = similarity(ref_distances).fill_diagonal_(0)
        distances = distances_between(embeddings, ref_emb)
        context = similarity(distances, ref_distances)
        is_self = self_match_mask(embeddings, ref_emb)

    valid = ~is_self & (distances < farthest)  # (N, R)
    same_class = labels[:, None] == ref_labels
    kept = both_clean = valid
    if filter_noise:
        weights = context.masked_fill(~valid, 0)
        vote = ref_vote = weighted_label_vote(weights, labels, ref_labels)
        if ref_context is not None:
            ref_vote = weighted_label_vote(ref_context, ref_labels, ref_labels)
        both_clean = vote.is_plurality[:, None] & ref_vote.is_plurality
        passes_vote = valid & torch.where(
            same_class,
            both_clean | (context > SURE_POSITIVE),
            context <= torch.minimum(vote.vote_fraction[:, None], ref_vote.vote_fraction),
        )
        anchor_has_no_pair = ~passes_vote.any(1, keepdim=True)
        kept = passes_vote | (valid & anchor_has_no_pair)
        both_clean = both_clean | anchor_has_no_pair
    positives, negatives = kept & same_class, kept & ~same_class

    most_similar_negative = context.masked_fill(~negatives, -torch.inf).amax(1, keepdim=True)
    least_similar_positive = context.masked_fill(~positives, torch.inf).amin(1, keepdim=True)
    nearest_negative = distances.masked_fill(~negatives, torch.inf).amin(1, keepdim=True)
    farthest_positive = distances.masked_fill(~positives, -torch.inf).amax(1, keepdim=True)
    has_context = context > 0
    hard_positives = (
        positives
        & (context < most_similar_negative + margin)
        & (has_context | (both_clean & (distances > nearest_negative)))
    )
    hard_negatives = (
        negatives
        & (context > least_similar_positive - margin)
        & (has_context | (both_clean & (distances < farthest_positive)))
    )
    a1, p = hard_positives.nonzero(as_tuple=True)
    a2, n = hard_negatives.nonzero(as_tuple=True)
    return a1, p, a2, n
