"""The contrastive term of a batch without a matrix of all similarities."""

from typing import Any

import torch
from torch import Tensor

from .chunks import row_chunks
from .precision import kernel_backward

CHUNK_NUMEL = 1 << 21  # similarities computed at a time


def chunked_contrastive_term(
    normalized: Tensor, labels: Tensor, pos_margin: float, neg_margin: float
) -> Tensor:
    """The contrastive term, (N,), over all pairs of normalized embeddings (N, D).

    Similarities are computed one chunk of rows at a time, and recomputed in backward.
    """
    return _ChunkedContrastiveTerm.apply(  # type: ignore[no-any-return, no-untyped-call]
        normalized, labels, pos_margin, neg_margin
    )


class _ChunkedContrastiveTerm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, labels: Tensor, pos_margin: float, neg_margin: float
    ) -> Tensor:
        ctx.margins = pos_margin, neg_margin
        n = len(x)
        pos_sums, neg_sums, num_active = x.new_zeros(n), x.new_zeros(n), x.new_zeros(2)
        for rows in row_chunks(n, n, CHUNK_NUMEL):
            i, _, pos_excess, neg_excess = _excess(x, labels, rows, *ctx.margins)
            pos_sums[rows].index_add_(0, i, pos_excess)
            neg_sums[rows] = neg_excess.sum(1)
            num_active += torch.stack([pos_excess.count_nonzero(), neg_excess.count_nonzero()])
        # Scaled so that the mean over the N anchors is the mean over the active pairs.
        factors = n / num_active.clamp_min_(1)
        ctx.save_for_backward(x, labels, factors)
        return pos_sums * factors[0] + neg_sums * factors[1]

    @staticmethod
    @kernel_backward
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, labels, factors = ctx.saved_tensors
        n = len(x)
        grad_x = torch.empty_like(x)
        for rows in row_chunks(n, n, CHUNK_NUMEL):
            i, j, pos_excess, neg_excess = _excess(x, labels, rows, *ctx.margins)
            # ds_ij + ds_ji = (g_i + g_j) factor for active negatives, minus that for active
            # positives: both ends of a pair at once
            grad_pairs = (grad_output[rows, None] + grad_output).mul_(factors[1])  # (B, N)
            grad_pairs.masked_fill_(neg_excess <= 0, 0)
            both_ends = grad_output[rows][i] + grad_output[j]
            grad_pairs[i, j] = -factors[0] * both_ends * (pos_excess > 0)
            grad_x[rows] = grad_pairs @ x
        return grad_x, None, None, None


def _excess(
    x: Tensor, labels: Tensor, rows: slice, pos_margin: float, neg_margin: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """How far pairs are on the wrong side of their margin: (m+ - s)_+ and (s - m-)_+.

    Returns rows (counted from ``rows.start``), columns and values of the positive pairs, and (B, N)
    values of the negative pairs.
    """
    similarities = x[rows] @ x.T
    i, j = (labels[rows, None] == labels).nonzero(as_tuple=True)
    pos_excess = (pos_margin - similarities[i, j]).relu_()
    pos_excess.masked_fill_(i + rows.start == j, 0)  # no self pairs
    similarities[i, j] = -2  # below any margin
    return i, j, pos_excess, similarities.sub_(neg_margin).relu_()
