"""Contextual similarity: how much the neighbourhoods of two samples agree (arXiv 2210.01908)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._function import Function
from ._precision import full_precision
from .cosine import dots, gram

# The slope that stands in for the derivative of the step function, per unit of squared distance.
STEP_SLOPE = 10.0


@full_precision
def contextual_similarity(
    similarities: Tensor,
    num_neighbors: int = 4,
    slack: float = 0.05,
    ref_similarities: Tensor | None = None,
) -> Tensor:
    """Contextual similarity of samples, from their cosine similarities.

    Args:
        similarities: (N, N) cosine similarities of a batch with itself; or (Q, R), of queries with
            references, when ``ref_similarities`` is given.
        num_neighbors: k >= 1, the sample itself included; clamped to the number of references.
        slack: eps >= 0, in units of squared Euclidean distance between unit vectors, [0, 4].
        ref_similarities: (R, R), of the references with themselves.

    Returns:
        (N, N) symmetric, or (Q, R), in [0, 1], float32 or wider. See
        :func:`contextual_similarity_from_distances`.

    Source: arXiv 2210.01908. The form with references is ours.

    Example:
        >>> import torch
        >>> from pml_extras.functional import pairwise_cosine
        >>> pairs = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
        >>> contextual_similarity(pairwise_cosine(pairs), num_neighbors=2)
        tensor([[1., 1., 0., 0.],
                [1., 1., 0., 0.],
                [0., 0., 1., 1.],
                [0., 0., 1., 1.]])
    """

    def squared_distances(s: Tensor) -> Tensor:
        found = torch.rsub(s, 2, alpha=2)
        # What rounding took below 0 goes back, without a part in the gradient.
        found.detach().clamp_min_(0)
        return found

    return contextual_similarity_from_distances(
        squared_distances(similarities),
        num_neighbors,
        slack,
        None if ref_similarities is None else squared_distances(ref_similarities),
    )


@full_precision
def contextual_similarity_from_distances(
    distances: Tensor,
    num_neighbors: int = 4,
    slack: float = 0.0,
    ref_distances: Tensor | None = None,
) -> Tensor:
    r"""Contextual similarity of samples, from any distances between them.

    A sample's neighbourhood holds what is no farther than its k-th nearest neighbour plus a slack:
    :math:`M_{ij} = [D_{ij} \le v_i(k) + \epsilon]`, and :math:`M^2` the same with
    :math:`\lfloor k/2 \rfloor`. Two samples agree as far as their neighbourhoods share members and
    non-members, and each sample asks its closest reciprocal neighbours for their opinion too:

    .. math::
        W &= \tfrac12 \Big(\frac{M M^\top}{c_i} + \frac{(1-M)(1-M)^\top}{N - c_i}\Big) M,
            \qquad c_i = \sum_j M_{ij} \\
        R &= M^2 (M^2)^\top \text{ (element-wise)}, \qquad
            J = \frac{R W}{\sum_l R_{il}}, \qquad S = \tfrac12 (J + J^\top)

    The step :math:`[\cdot]` is exact in forward and has a constant slope of 10 per unit of distance
    in backward; the k-th distances and the denominators carry no gradient. With queries and
    references, all neighbours are references, and a reference counts a query as near by the radius
    :math:`v` of its own neighbourhood.

    Args:
        distances: (N, N) between the samples of a batch, smaller is nearer; or (Q, R), from queries
            to references, when ``ref_distances`` is given.
        num_neighbors: k >= 1, the sample itself included; clamped to the number of references.
        slack: eps >= 0, in units of ``distances``.
        ref_distances: (R, R) between the references.

    Returns:
        (N, N) symmetric, or (Q, R), in [0, 1].

    Source: arXiv 2210.01908. A sample counts as its own nearest neighbour whatever the rounding of
    its distance to itself, a neighbourhood of the whole batch has a non-member share of 0 (the
    authors' code divides 0 by 0), and k = 1 and k > N are allowed; these, other distances and
    references are ours.
    """
    if distances.numel() == 0:
        return distances.clone()
    if ref_distances is None:
        within: Tensor = _WithinBatch.apply(distances, num_neighbors, slack)  # type: ignore[no-untyped-call]
        return within
    ref_distances = _nearest_to_itself(ref_distances)
    k = min(num_neighbors, ref_distances.shape[1])
    half_k = max(k // 2, 1)

    # Neighbourhoods among the references, of queries (Q, R) and of references (R, R), and how the
    # references see the queries: (Q, R), too, by each reference's own radius.
    ref_radius, ref_half_radius = (_radius(ref_distances, r, slack) for r in (k, half_k))
    ref_near = _step(ref_distances, ref_radius)
    ref_nearest = _step(ref_distances, ref_half_radius)
    ref_members = ref_near.sum(1)
    ref_opinion = ref_near * agreement(
        gram(ref_near), ref_members[:, None], ref_members, len(ref_near)
    )
    ref_reciprocal = ref_nearest * ref_nearest.T
    near = _step(distances, _radius(distances, k, slack))
    nearest = _step(distances, _radius(distances, half_k, slack))
    seen_near = _step(distances, ref_radius.T)
    seen_nearest = _step(distances, ref_half_radius.T)
    context = _average_over(nearest * seen_nearest, ref_opinion)
    opinion_of_query = seen_near.T * agreement(
        dots(ref_near, near), ref_members[:, None], near.sum(1), len(ref_near)
    )
    context_back = _average_over(ref_reciprocal, opinion_of_query)
    return (context + context_back.T) / 2


class _WithinBatch(Function):
    """The contextual similarity of a batch with itself: two matrix products, three in backward.

    The closed form is derived in :func:`sparse_contextual_loss`; autograd through the steps takes
    six products and holds on to three times as many matrices.
    """

    @staticmethod
    def forward(ctx: Any, distances: Tensor, num_neighbors: int, slack: float) -> Tensor:
        n = len(distances)
        k = min(num_neighbors, n)
        rows = torch.arange(n, device=distances.device)
        near, nearest = (m.to(distances.dtype) for m in neighborhoods(distances, rows, k, slack))

        members = near.sum(1, keepdim=True)
        strangers = n - members
        per_stranger = 0.5 / strangers.clamp_min(1)
        per_shared = 0.5 / members + per_stranger
        agreement = (near @ near.T).mul_(per_shared).add_(per_stranger * (strangers - members.T))
        opinion = agreement * near
        reciprocal = nearest * nearest.T
        per_friend = 1 / reciprocal.sum(1, keepdim=True)
        context = (reciprocal @ opinion).mul_(per_friend)
        ctx.save_for_backward(
            near, nearest, per_shared, per_stranger, agreement, opinion, reciprocal, per_friend
        )
        return (context + context.T) / 2

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("contextual similarity cannot be differentiated twice")
        near, nearest, per_shared, per_stranger, agreement, opinion, reciprocal, per_friend = (
            ctx.saved_tensors
        )
        by_context = (upstream + upstream.T).mul_(per_friend / 2)
        by_opinion = reciprocal @ by_context
        by_reciprocal = by_context @ opinion.T
        by_reciprocal -= (reciprocal * by_reciprocal).sum(1, keepdim=True) * per_friend
        by_nearest = (by_reciprocal + by_reciprocal.T).mul_(nearest.T)

        on_members = by_opinion * near
        by_shared = on_members * per_shared
        by_strangers = on_members.mul_(per_stranger)
        constant = by_strangers.sum(1) + by_strangers.sum(0)
        by_near = by_opinion.mul_(agreement).addmm_(by_shared + by_shared.T, near)
        by_distance = by_near.add_(by_nearest).sub_(constant[:, None]).mul_(-STEP_SLOPE)
        return by_distance.fill_diagonal_(0), None, None


def neighborhoods(distances: Tensor, rows: Tensor, k: int, slack: float) -> tuple[Tensor, Tensor]:
    """(B, N) bool, twice: what lies in the rows' neighbourhoods, of k and of k // 2."""
    # Rounding, and dot products, can put others before the sample itself: forbid it.
    own = rows[:, None]
    distances = distances.scatter(1, own, distances.amin(1, keepdim=True))
    nearest = distances.topk(k, dim=1, largest=False).values + slack
    return distances <= nearest[:, -1:], distances <= nearest[:, None, max(k // 2, 1) - 1]


def neighborhood_mask(distances: Tensor, num_neighbors: int, slack: float) -> Tensor:
    """(N, R) bool: which samples lie in each sample's neighbourhood, for (N, R) distances."""
    return distances <= _radius(distances, min(num_neighbors, distances.shape[1]), slack)


def _nearest_to_itself(distances: Tensor) -> Tensor:
    """Rounding, and dot products, can put others before the sample itself: forbid it."""
    diagonal = torch.eye(len(distances), dtype=torch.bool, device=distances.device)
    return torch.where(diagonal, distances.detach().amin(1, keepdim=True), distances)


def _radius(distances: Tensor, num_neighbors: int, slack: float) -> Tensor:
    return distances.detach().kthvalue(num_neighbors, dim=1, keepdim=True).values + slack


def _step(distances: Tensor, radius: Tensor) -> Tensor:
    """1 within the radius and 0 beyond it; in backward, a straight line of slope -10."""
    within = (distances <= radius).to(distances.dtype)
    return within + STEP_SLOPE * (distances.detach() - distances)


def agreement(common: Tensor, size: Tensor, other_size: Tensor, num_references: int) -> Tensor:
    """How far i's members are j's members, and i's non-members j's: the mean of the two shares,
    from how many members they have in common and how many each has."""
    members = size.detach()
    common_outside = num_references - size - other_size + common
    non_members = (num_references - members).clamp_min(1)
    return (common / members + common_outside / non_members) / 2


def _average_over(weights: Tensor, values: Tensor) -> Tensor:
    # Only a query outside the reach of all references has no weights at all.
    total = weights.sum(1, keepdim=True)
    return dots(weights, values.T) / torch.where(total == 0, 1, total)
