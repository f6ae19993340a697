"""Hard pairs by contextual similarity, without those whose labels look wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ._label_noise import WeightedLabelVote, weighted_label_vote
from ._precision import full_precision
from .contextual_similarity import contextual_similarity_from_distances
from .copies import row_fingerprints
from .cosine import pairwise_cosine
from .sparse_context import Growing, blocks, context_rows

# A positive pair this similar in context is kept whatever the labels around it say.
SURE_POSITIVE = 0.25


@full_precision
def contextual_pairs(
    embeddings: Tensor,
    labels: Tensor,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    num_neighbors: int = 4,
    margin: float = 0.1,
    filter_noise: bool = True,
    distance: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""Positive and negative pairs that are hard by context and probably labelled right.

    With S the contextual similarity (slack 0, so that only the order of the distances counts) and
    v the share of a sample's own class in its :func:`weighted_label_vote`:

    - a positive pair is kept if both samples are trusted, or if :math:`S_{ij} > 0.25`;
    - a negative pair is kept unless :math:`S_{ij} > \min(v_i, v_j)`;
    - an anchor that would be left without any pair keeps them all;
    - of the kept pairs, a positive is hard if S is below that of the anchor's most similar negative
      plus the margin, a negative if S is above that of its least similar positive minus the margin;
    - where S is 0 it cannot tell, and the distance decides: a positive must be farther than the
      anchor's nearest negative, a negative nearer than its farthest positive, and both samples
      trusted, because a wrong label is wrong about distances too.

    A few anchors are looked at at a time. Within a large batch no N x N matrix exists, unless
    neighbourhoods are a large part of it (of equal embeddings, say); between references, one does.

    Args:
        embeddings: (N, D), the anchors.
        labels: (N,).
        ref_emb: (R, D), what they are paired with, which is also where all neighbours are. Default:
            the anchors themselves. A reference that equals an anchor to the last bit is that
            anchor: no pair, no vote.
        ref_labels: (R,).
        num_neighbors: k >= 1 of the contextual similarity, the sample itself included.
        margin: in units of S; larger keeps easier pairs.
        filter_noise: whether to leave out pairs whose labels look wrong.
        distance: from (B, D) and (R, D) embeddings to (B, R) distances, smaller is nearer. Default:
            the negative cosine similarity.

    Returns:
        Four long tensors, as PML's pair miners, of anchors and positives, anchors and negatives.

    Source: ours, on the contextual similarity of arXiv 2210.01908.

    Example:
        >>> import torch
        >>> x, labels = torch.tensor([[0.0], [1.0], [3.5], [5.0]]), torch.tensor([0, 0, 1, 1])
        >>> rules = {"num_neighbors": 2, "filter_noise": False, "margin": 1.1}
        >>> contextual_pairs(x, labels, distance=torch.cdist, **rules)[:2]
        (tensor([0, 1, 2, 3]), tensor([1, 0, 3, 2]))
    """
    if (ref_emb is None) != (ref_labels is None):
        raise ValueError("ref_labels are required with ref_emb")
    if len(embeddings) == 0 or (ref_emb is not None and len(ref_emb) == 0):
        p, n = labels.new_empty(2, 0, dtype=torch.long)
        return p, p.clone(), n, n.clone()
    # A sample that is not finite has no place in any order: it is nobody's neighbour.
    far = torch.finfo(embeddings.dtype).max  # not infinity, which less itself is NaN

    def distances(x: Tensor, y: Tensor) -> Tensor:
        found = -pairwise_cosine(x, y) if distance is None else distance(x, y)
        return found.to(embeddings.dtype).masked_fill(~found.isfinite(), far)

    if ref_emb is None or ref_labels is None:
        ref_emb, ref_labels = embeddings, labels
        names = ref_names = torch.arange(len(embeddings), device=embeddings.device)
        context = context_rows(
            lambda rows: distances(embeddings[rows], embeddings),
            len(embeddings),
            num_neighbors,
            embeddings.device,
        )
        ref_context = None
    else:
        names, ref_names = row_fingerprints(embeddings), row_fingerprints(ref_emb)
        among = distances(ref_emb, ref_emb)
        ref_context = contextual_similarity_from_distances(among, num_neighbors)
        context = contextual_similarity_from_distances(
            distances(embeddings, ref_emb), num_neighbors, ref_distances=among
        ).__getitem__

    def look(rows: Tensor) -> Pairs:
        block = distances(embeddings[rows], ref_emb)
        usable = (names[rows, None] != ref_names) & (block < far)
        return Pairs(block, context(rows), labels[rows, None] == ref_labels, usable)

    parts = list(blocks(len(embeddings), len(ref_emb), embeddings.device))
    if filter_noise:
        votes = []
        for rows in parts:
            pairs = look(rows)
            weights = pairs.context.masked_fill(~pairs.usable, 0)
            votes.append(weighted_label_vote(weights, labels[rows], ref_labels))
        vote = ref_vote = WeightedLabelVote(*(torch.cat(part) for part in zip(*votes, strict=True)))
        if ref_context is not None:
            ref_vote = weighted_label_vote(ref_context.fill_diagonal_(0), ref_labels, ref_labels)
    else:
        vote, ref_vote = _full_trust(embeddings), _full_trust(ref_emb)

    r = len(ref_emb)
    positives, negatives = (Growing(4 * len(embeddings), embeddings.device) for _ in range(2))
    for rows in parts:
        of_rows = WeightedLabelVote(*(part[rows] for part in vote))
        kinds = _hard_and_likely(look(rows), of_rows, ref_vote, margin)
        for found, hard in zip((positives, negatives), kinds, strict=True):
            found.append(hard.view(-1).nonzero().squeeze(1) + rows[0] * r)
    p, n = positives.numbers(), negatives.numbers()
    return p // r, p % r, n // r, n % r


class Pairs(NamedTuple):
    """What is known of the pairs of B anchors with R references: (B, R) each."""

    distances: Tensor
    context: Tensor
    same_class: Tensor
    usable: Tensor
    """Bool: both are finite, and they are not the same sample."""


def _full_trust(samples: Tensor) -> WeightedLabelVote:
    share = samples.new_full((len(samples),), float("inf"))
    return WeightedLabelVote(share, torch.ones_like(share, dtype=torch.bool))


def _hard_and_likely(
    pairs: Pairs, vote: WeightedLabelVote, ref_vote: WeightedLabelVote, margin: float
) -> tuple[Tensor, Tensor]:
    """(B, R) bool, twice: the positive and the negative pairs to keep."""
    distances, context, same_class, usable = pairs
    both_trusted = vote.is_plurality[:, None] & ref_vote.is_plurality
    likely = torch.where(
        same_class,
        both_trusted | (context > SURE_POSITIVE),
        context <= torch.minimum(vote.vote_fraction[:, None], ref_vote.vote_fraction),
    )
    left_without = ~(usable & likely).any(1, keepdim=True)
    kept = usable & (likely | left_without)
    positives, negatives = kept & same_class, kept & ~same_class
    has_context = context > 0
    distance_decides = ~has_context & (both_trusted | left_without)

    inf = float("inf")
    nearest_negative = distances.masked_fill(~negatives, inf).amin(1, keepdim=True)
    farthest_positive = distances.masked_fill(~positives, -inf).amax(1, keepdim=True)
    most_similar_negative = context.masked_fill(~negatives, -inf).amax(1, keepdim=True)
    least_similar_positive = context.masked_fill(~positives, inf).amin(1, keepdim=True)
    hard_positives = (
        positives
        & (context < most_similar_negative + margin)
        & (has_context | (distance_decides & (distances > nearest_negative)))
    )
    hard_negatives = (
        negatives
        & (context > least_similar_positive - margin)
        & (has_context | (distance_decides & (distances < farthest_positive)))
    )
    return hard_positives, hard_negatives
