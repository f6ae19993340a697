"""The contextual term and its exact gradient, on sparse matrices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._function import Function
from ._precision import full_precision
from ._sparse import same_class
from .contextual_similarity import STEP_SLOPE, agreement
from .cosine import unit_rows
from .sparse_context import (
    SPARSITY,
    Distances,
    SparseContext,
    neighborhood_size,
    sparse_context,
)


@full_precision
def sparse_contextual_loss(
    embeddings: Tensor, labels: Tensor, num_neighbors: int = 4, slack: float = 0.05
) -> Tensor:
    r"""As :func:`contextual_loss`, for batches in which neighbourhoods and classes are small.

    Of the matrices that the contextual similarity is made of, the neighbourhoods M, the weights W
    and the reciprocal neighbours R have a few entries a row, and so have their products. With
    :math:`G = M M^\top`, whose entries count shared neighbours, the number of shared strangers is
    :math:`N - c_i - c_j + G_{ij}`, and the gradient follows in closed form (:math:`\circ`:
    element-wise; :math:`g_i` comes from above):

    .. math::
        H &= \tfrac12 \Big(\frac{G}{c_i} + \frac{N - c_i - c_j + G}{N - c_i}\Big), \quad
            W = H \circ M, \quad J = R W / r_i, \quad S = \tfrac12 (J + J^\top) \\
        \hat J &= \frac{(g_i + g_j)(S - Y)}{N r_i} \text{ off the diagonal}, \quad
            E = R \hat J, \quad
            \hat R = \hat J W^\top - \mathrm{rowsum}(\hat J \circ J) \\
        \widehat{M^2} &= M^{2\top} \circ (\hat R + \hat R^\top) \\
        P &= \frac{E \circ M}{2 c_i}, \quad Q = \frac{E \circ M}{2 (N - c_i)}, \quad T = P + Q \\
        \hat M &= E \circ H + (T + T^\top) M
            - (\mathrm{rowsum}(Q)_i + \mathrm{colsum}(Q)_i) \\
        \hat s &= 20\,(\hat M + \widehat{M^2}), \qquad \hat x = (\hat s + \hat s^\top)\,x

    The last term of :math:`\hat M` is the same along a row, so that it reaches the embeddings
    without a matrix. No N x N matrix exists at any time. It cannot be differentiated twice.

    Args:
        embeddings: (N, D), any scale.
        labels: (N,).
        num_neighbors: k >= 1, the sample itself included; clamped to N.
        slack: eps >= 0, in units of squared distance between unit vectors.

    Returns:
        (N,) losses in [0, 1].

    Source: the term is arXiv 2210.01908's; the closed form is ours.

    Example:
        >>> import torch
        >>> x = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
        >>> sparse_contextual_loss(x, torch.tensor([0, 0, 1, 1]), num_neighbors=2)
        tensor([0., 0., 0., 0.])
    """
    if len(embeddings) == 0:
        return embeddings.sum(1)
    unit = unit_rows(embeddings)
    losses: Tensor = _SparseContextualLoss.apply(unit, labels, num_neighbors, slack)  # type: ignore[no-untyped-call]
    return losses


@full_precision
@torch.no_grad()
def sparse_pays(
    embeddings: Tensor, labels: Tensor, num_neighbors: int = 4, slack: float = 0.05
) -> bool:
    """Whether :func:`sparse_contextual_loss` is the faster way for this batch.

    It is on a CPU, if neighbourhoods (measured on a sample of rows) and classes are small against
    the batch. On a GPU, small and middling batches are better served by dense products, which need
    no word from the host.
    """
    n = len(embeddings)
    distances = _squared_distances(unit_rows(embeddings))
    k = min(num_neighbors, n)
    per_row = neighborhood_size(distances, n, k, slack, embeddings.device, SPARSITY)
    if per_row * SPARSITY >= n:
        return False
    classes = torch.bincount(torch.unique(labels, return_inverse=True)[1]).double()
    return float(classes.square().sum()) / n * SPARSITY < n


def _squared_distances(unit: Tensor) -> Distances:
    return lambda rows: (2 - 2 * (unit[rows] @ unit.T)).clamp_min_(0)


class _SparseContextualLoss(Function):
    @staticmethod
    def forward(ctx: Any, unit: Tensor, labels: Tensor, k: int, slack: float) -> Tensor:
        n = len(unit)
        found = sparse_context(_squared_distances(unit), n, min(k, n), slack, unit.device)
        context = found.context

        # All pairs of a class have an error of 1, as if S were 0 everywhere; then S corrects it.
        _, numbers, sizes = torch.unique(labels, return_inverse=True, return_counts=True)
        same = (labels[context.rows] == labels[context.cols]).to(unit.dtype)
        error = (context.values - same).square() - same
        error[context.rows == context.cols] = 0
        losses: Tensor = (context.with_values(error).row_sums() + (sizes[numbers] - 1)) / n

        ctx.save_for_backward(unit, numbers, *found.tensors())
        return losses

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "sparse_contextual_loss cannot be differentiated twice: use contextual_loss"
            )
        unit, numbers, *tensors = ctx.saved_tensors
        n = len(unit)
        found = SparseContext.of(tensors)
        near, nearest, shared, reciprocal, opinion, context, members, degree = found
        by_context = context.plus(same_class(numbers, unit.new_tensor(-1.0)))
        i, j = by_context.rows, by_context.cols
        weight = (upstream[i] + upstream[j]) / (n * degree[i])
        by_context = by_context.with_values((by_context.values * weight).masked_fill(i == j, 0))

        by_opinion = reciprocal @ by_context
        by_reciprocal = by_context @ opinion.transposed()
        of_friends = reciprocal.with_values(by_reciprocal.at(reciprocal.rows, reciprocal.cols))
        common = of_friends.row_sums() / degree
        i, j = nearest.rows, nearest.cols
        by_nearest = nearest.with_values(
            by_reciprocal.at(i, j) - common[i] + by_reciprocal.at(j, i) - common[j]
        )

        i, j = near.rows, near.cols
        on_members = by_opinion.at(i, j) / 2
        strangers = (len(members) - members).clamp_min(1)
        by_strangers = near.with_values(on_members / strangers[i])
        constant = by_strangers.row_sums() + by_strangers.transposed().row_sums()
        by_shared = near.with_values(on_members / members[i] + by_strangers.values)
        i, j = by_opinion.rows, by_opinion.cols
        agreed = agreement(shared.at(i, j), members[i], members[j], len(members))
        by_near = by_opinion.with_values(by_opinion.values * agreed)
        by_near = by_near.plus(by_shared.plus(by_shared.transposed()) @ near)

        by_similarity = by_near.plus(by_nearest.transposed())
        i, j = by_similarity.rows, by_similarity.cols
        by_similarity = by_similarity.with_values(by_similarity.values.masked_fill(i == j, 0))
        by_unit = by_similarity.plus(by_similarity.transposed()).times_dense(unit)
        # The constant of each row, everywhere but on the diagonal, and its transpose.
        by_unit -= constant[:, None] * (unit.sum(0) - unit)
        by_unit -= constant @ unit - constant[:, None] * unit
        return 2 * STEP_SLOPE * by_unit, None, None, None
