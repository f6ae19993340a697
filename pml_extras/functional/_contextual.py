"""Contextual similarity and the three terms of the contextual loss (arXiv 2210.01908)."""

from collections.abc import Collection
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize, relu

from ._kernels.chunked_contrastive import chunked_contrastive_term
from ._kernels.precision import full_precision, pairwise_dot
from ._kernels.self_matches import self_match_mask
from ._kernels.sparse_contextual import (
    DistanceRows,
    SparseContextualSimilarity,
    prefers_sparse,
    sparse_contextual_term,
    squared_distance_rows,
)
from ._neighborhoods import (
    STEP_SLOPE,
    NumNeighbors,
    knn_radii,
    neighborhood_overlap,
    self_nearest,
    squared_distances,
)


@full_precision
def contextual_similarity(
    distances: Tensor,
    ref_distances: Tensor | None = None,
    *,
    num_neighbors: NumNeighbors = 4,
    slack: float = 0.05,
) -> Tensor:
    r"""Contextual similarity: how much the neighborhoods of two samples overlap.

    A sample's neighborhood holds all samples that are no farther than its k-th nearest neighbor
    plus a slack: :math:`M_{ij} = [D_{ij} \le v_i(k) + \epsilon]`. :math:`M'` is the same with
    :math:`\max(\lfloor k/2 \rfloor, 1)` neighbors. The overlap of two neighborhoods counts shared
    neighbors and shared non-neighbors; with a sample that is no neighbor, it counts as 0. It is
    then averaged over each sample's reciprocal neighbors (local query expansion):

    .. math::
        W &= \tfrac12 \Big(\frac{M M^\top}{c_i} + \frac{(1-M)(1-M)^\top}{N - c_i}\Big) \circ M,
            \qquad c_i = \sum_j M_{ij} \\
        R &= M' \circ M'^\top, \qquad
            J = \frac{R W}{\sum_l R_{il}}, \qquad S = \tfrac12 (J + J^\top)

    The step :math:`[\cdot]` has a straight-through gradient: exact in forward, a constant slope of
    -10 per unit of distance in backward. The radii, a sample's distance to itself, and the
    denominators :math:`c_i` and :math:`N - c_i` carry no gradient.

    With Q queries and N references, all neighbors are references. A query lies in the neighborhood
    of a reference if it is within the reference's own radius.

    Args:
        distances: (N, N) between the samples of a batch, smaller is nearer; or (Q, N) from queries
            to references, with ``ref_distances``. For the published form, squared distances of
            normalized embeddings: ``2 - 2 * pairwise_cosine(x)``.
        ref_distances: (N, N) between the references.
        num_neighbors: k >= 1, including the sample itself (a query that is not a reference
            has k others); clamped to the number of references. Within a batch also (N,) int64, one
            k per sample.
        slack: eps >= 0, in units of ``distances``.

    Returns:
        (N, N) symmetric, or (Q, N), in [0, 1], float32 or wider.

    Source: arXiv 2210.01908. Ours: every sample is its own nearest neighbor whatever the rounding
    (except a query that is also a reference); a neighborhood of the whole batch has a non-neighbor
    overlap of 0, where the authors' code divides 0 by 0; k = 1 and k > N are allowed; other
    distances and references.

    Example:
        >>> import torch
        >>> from pml_extras.functional import contextual_similarity, pairwise_cosine
        >>> x = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
        >>> contextual_similarity(2 - 2 * pairwise_cosine(x), num_neighbors=2)
        tensor([[1., 1., 0., 0.],
                [1., 1., 0., 0.],
                [0., 0., 1., 1.],
                [0., 0., 1., 1.]])
    """
    if distances.numel() == 0:
        return distances.clone()
    if ref_distances is not None:
        return _similarity_to_references(distances, ref_distances, num_neighbors, slack)
    return _similarity_within_batch(distances, num_neighbors, slack)


def _similarity_within_batch(distances: Tensor, k: NumNeighbors, slack: float) -> Tensor:
    """All matrices are (N, N)."""
    n = len(distances)
    distances = self_nearest(distances, torch.arange(n, device=distances.device))
    radius, half_radius = knn_radii(distances, k, slack)
    knn_mask = _step(distances, radius)  # M
    half_knn_mask = _step(distances, half_radius)  # M'
    neighbor_weights = _overlap(knn_mask, knn_mask) * knn_mask  # W
    reciprocal = half_knn_mask * half_knn_mask.T  # R
    expanded = _weighted_mean(reciprocal, neighbor_weights)  # J
    return (expanded + expanded.T) / 2  # S


def _similarity_to_references(
    distances: Tensor, ref_distances: Tensor, k: NumNeighbors, slack: float
) -> Tensor:
    """The same between Q queries and N references: both directions of J are computed."""
    num_refs = len(ref_distances)
    ref_distances = self_nearest(ref_distances, torch.arange(num_refs, device=distances.device))
    radius, half_radius = knn_radii(distances, k, slack)  # of the queries
    ref_radius, ref_half_radius = knn_radii(ref_distances, k, slack)

    query_knn, query_half_knn = _step(distances, radius), _step(distances, half_radius)  # (Q, N)
    ref_knn, ref_half_knn = _step(ref_distances, ref_radius), _step(ref_distances, ref_half_radius)
    # Which references have the query in their neighborhood, (Q, N)
    in_ref_knn = _step(distances, ref_radius.T)
    in_ref_half_knn = _step(distances, ref_half_radius.T)

    ref_weights = _overlap(ref_knn, ref_knn) * ref_knn  # (N, N)
    query_to_ref = _weighted_mean(query_half_knn * in_ref_half_knn, ref_weights)  # (Q, N)
    query_weights = _overlap(ref_knn, query_knn) * in_ref_knn.T  # (N, Q)
    ref_to_query = _weighted_mean(ref_half_knn * ref_half_knn.T, query_weights)  # (N, Q)
    return (query_to_ref + ref_to_query.T) / 2


def _step(distances: Tensor, radius: Tensor) -> Tensor:
    """1 within the radius, 0 outside; a straight-through estimator in backward."""
    inside = (distances <= radius).to(distances.dtype)
    return inside + STEP_SLOPE * (distances - distances.detach())


def _overlap(mask: Tensor, other_mask: Tensor) -> Tensor:
    """The overlap H, (A, B), of neighborhoods given as masks, (A, N) and (B, N)."""
    return neighborhood_overlap(
        num_shared=pairwise_dot(mask, other_mask),
        size=mask.sum(1, keepdim=True),
        other_size=other_mask.sum(1),
        num_references=mask.shape[1],
    )


def _weighted_mean(weights: Tensor, values: Tensor) -> Tensor:
    """The mean of the rows of ``values`` (N, C) with weights (A, N): (A, C), 0 without weights."""
    total = weights.sum(1, keepdim=True)
    return pairwise_dot(weights, values.T) / torch.where(total == 0, 1, total)


def contextual_similarity_matrix(
    distance_rows: DistanceRows, samples: Tensor, *, num_neighbors: NumNeighbors
) -> Tensor | SparseContextualSimilarity:
    """The contextual similarity of N samples without slack, dense or sparse.

    Call it under ``no_grad``. Both kinds offer ``S @ x``, ``S.diagonal()`` and ``S.to_dense()``.

    Args:
        distance_rows: returns the distances, (B, N), of a slice of B samples to all.
        samples: (N, ...), for their number and device.
    """
    if prefers_sparse(distance_rows, num_neighbors, 0.0, samples):
        return SparseContextualSimilarity(distance_rows, num_neighbors, samples)
    distances = distance_rows(slice(0, len(samples)))
    return contextual_similarity(distances, num_neighbors=num_neighbors, slack=0.0)


class ContextualLossTerms(NamedTuple):
    """The three terms of :func:`contextual_loss`, not yet weighted."""

    contextual: Tensor
    """(N,) in [0, 1]; the mean is the published term."""
    contrastive: Tensor
    """(N,); the mean is the published term."""
    similarity: Tensor
    """(), the squared distance of the mean similarity from its target."""


@full_precision
def contextual_loss(
    embeddings: Tensor,
    labels: Tensor,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    pair_weights: tuple[Tensor, Tensor] | None = None,
    *,
    num_neighbors: int = 4,
    slack: float = 0.05,
    pos_margin: float = 0.75,
    neg_margin: float = 0.6,
    target_similarity: float = 0.25,
    terms: Collection[str] = ContextualLossTerms._fields,
    implementation: Literal["auto", "sparse", "reference"] = "auto",
) -> ContextualLossTerms:
    r"""The three terms of the contextual loss, for samples i and references j.

    .. math::
        \ell^\mathrm{context}_i &= \frac1R \sum_{j \ne i} (S_{ij} - [y_i = y_j])^2 \\
        L_\mathrm{contrast} &= \operatorname*{mean}_{\text{active positives}} (m^+ - s_{ij})_+
            + \operatorname*{mean}_{\text{active negatives}} (s_{ij} - m^-)_+ \\
        L_\mathrm{similarity} &= \Big(\frac1{NR} \sum_{ij} s_{ij} - t\Big)^2

    with the cosine similarity s and the :func:`contextual_similarity` S of the squared distances
    :math:`2 - 2s`. A pair is active if it is on the wrong side of its margin.

    Args:
        embeddings: (N, D), any floating dtype and scale.
        labels: (N,) integers.
        ref_emb: (R, D), R >= 1, the references. Default: the batch itself. References that equal a
            sample bit by bit are left out of its contextual error.
        ref_labels: (R,) integers, required with ``ref_emb``.
        pair_weights: two (N, R) tensors, bool or float32: how often each pair counts as a positive
            and as a negative of the contrastive term. Default: all pairs of equal and of different
            labels, once.
        num_neighbors: k >= 1, including the sample itself (a sample that is not a reference
            has k others); clamped to R.
        slack: eps >= 0, in units of squared distance between normalized embeddings.
        pos_margin, neg_margin: :math:`m^+` and :math:`m^-`, cosine similarities.
        target_similarity: t, a cosine similarity.
        terms: the names of the terms to compute. The others are 0. Default: all.
        implementation: "reference" is plain autograd. "sparse" has a hand-derived gradient
            and cannot be differentiated twice. It makes no (N, N) matrix, except for
            ``pair_weights``, is fast if neighborhoods and classes are small, and does not support
            references. "auto" measures some of the neighborhoods and takes the one that is
            probably faster.

    Returns:
        :class:`ContextualLossTerms`, float32 or wider.

    Source: arXiv 2210.01908 and the authors' code. References and the sparse form are ours.

    Example:
        >>> import torch
        >>> from pml_extras.functional import contextual_loss
        >>> x = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
        >>> contextual_loss(x, torch.tensor([0, 0, 1, 1]), num_neighbors=2).contextual
        tensor([0., 0., 0., 0.])
    """
    if (ref_emb is None) != (ref_labels is None):
        raise ValueError("ref_emb and ref_labels are required together")
    if len(embeddings) == 0:
        zeros = embeddings.sum(1)
        return ContextualLossTerms(zeros, zeros, zeros.sum())
    x = normalize(embeddings)
    refs = x if ref_emb is None else normalize(ref_emb)
    contextual = contrastive = zeros = (0 * x).sum(1)  # with a gradient, which is 0
    similarity = zeros.sum()
    if implementation == "auto":
        is_sparse = ref_emb is None and prefers_sparse(
            squared_distance_rows(x), num_neighbors, slack, x, labels
        )
        implementation = "sparse" if is_sparse else "reference"
    if implementation not in ("sparse", "reference"):
        raise ValueError(f"unknown implementation {implementation!r}")
    is_sparse = implementation == "sparse"
    if is_sparse and ref_emb is not None:
        raise ValueError('implementation="sparse" does not support ref_emb')

    # L_similarity: the mean of all dot products is the dot product of the means.
    if "similarity" in terms:
        similarity = (x.mean(0) @ refs.mean(0) - target_similarity).square()

    # L_context and L_contrast without a matrix
    if is_sparse and "contextual" in terms:
        contextual = sparse_contextual_term(x, labels, num_neighbors, slack)
    if is_sparse and "contrastive" in terms and pair_weights is None:
        contrastive = chunked_contrastive_term(x, labels, pos_margin, neg_margin)
    needs_context = "contextual" in terms and not is_sparse
    needs_contrast = "contrastive" in terms and not (is_sparse and pair_weights is None)
    if not (needs_context or needs_contrast):
        return ContextualLossTerms(contextual, contrastive, similarity)

    cosines = pairwise_dot(x, refs)  # s, (N, R)
    if ref_emb is None or ref_labels is None:
        ref_labels, ref_distances = labels, None
        is_self = torch.eye(len(x), dtype=torch.bool, device=x.device)
    else:
        ref_distances = squared_distances(pairwise_dot(refs, refs))
        is_self = self_match_mask(embeddings, ref_emb)
    same_class = labels[:, None] == ref_labels  # y, (N, R)

    # L_context
    if needs_context:
        distances = squared_distances(cosines)
        context = contextual_similarity(
            distances, ref_distances, num_neighbors=num_neighbors, slack=slack
        )
        errors = (context - same_class.to(context.dtype)).masked_fill(is_self, 0)
        contextual = errors.square().sum(1) / len(refs)

    # L_contrast
    if needs_contrast:
        if pair_weights is None:
            # As in PML, a copy of the sample among the references counts as a positive.
            positives = same_class & ~is_self if ref_emb is None else same_class
            pair_weights = positives, ~same_class
        pos_term = _mean_over_active(relu(pos_margin - cosines), pair_weights[0])
        neg_term = _mean_over_active(relu(cosines - neg_margin), pair_weights[1])
        contrastive = pos_term + neg_term
    return ContextualLossTerms(contextual, contrastive, similarity)


def _mean_over_active(excess: Tensor, weights: Tensor) -> Tensor:
    """(N,), from (N, R): row sums, scaled so that their mean is the mean over active pairs."""
    num_active = torch.where(excess > 0, weights, 0).sum().to(excess.dtype)
    return (excess * weights).sum(1) * (len(excess) / num_active.clamp_min(1))
