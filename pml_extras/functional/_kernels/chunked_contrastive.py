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
    losses: Tensor = _ChunkedContrastiveTerm.apply(  # type: ignore[no-untyped-call]
        normalized, labels, pos_margin, neg_margin
    )
    return losses


class _ChunkedContrastiveTerm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, labels: Tensor, pos_margin: float, neg_margin: float
    ) -> Tensor:
        ctx.margins = pos_margin, neg_margin
        n = len(x)
        pos_sums, neg_sums, num_active = x.new_zeros(n), x.new_zeros(n), x.new_zeros(2)
        for rows in row_chunks(n, n, CHUNK_NUMEL):
            excess, same_class = _excess(x, labels, rows, *ctx.margins)
            pos_excess = excess * same_class
            pos_sums[rows] = pos_excess.sum(1)
            neg_sums[rows] = excess.sum(1) - pos_sums[rows]
            # Without active negatives both sums are equal, so the difference is exactly 0.
            num_pos_active = pos_excess.count_nonzero()
            num_active += torch.stack([num_pos_active, excess.count_nonzero() - num_pos_active])
        # Each of the two means is divided among the anchors, times N.
        factors = n / num_active.clamp_min_(1)
        ctx.save_for_backward(x, labels, factors)
        losses: Tensor = pos_sums * factors[0] + neg_sums * factors[1]
        return losses

    @staticmethod
    @kernel_backward
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, labels, factors = ctx.saved_tensors
        n = len(x)
        grad_x = torch.empty_like(x)
        for rows in row_chunks(n, n, CHUNK_NUMEL):
            excess, same_class = _excess(x, labels, rows, *ctx.margins)
            # ds_ij + ds_ji = (g_i + g_j) factor for active pairs: both ends of a pair at once
            grad_pairs = torch.where(same_class, -factors[0], factors[1]).mul_(excess > 0)
            grad_pairs *= grad_output[rows, None] + grad_output  # (B, N)
            grad_x[rows] = grad_pairs @ x
        return grad_x, None, None, None


def _excess(
    x: Tensor, labels: Tensor, rows: slice, pos_margin: float, neg_margin: float
) -> tuple[Tensor, Tensor]:
    """How far pairs are on the wrong side of their margin, (B, N), and which are positive.

    This is (m+ - s)_+ for positive pairs, (s - m-)_+ for negative pairs, 0 for self pairs.
    """
    similarities = x[rows] @ x.T
    same_class = labels[rows, None] == labels
    excess = torch.where(same_class, pos_margin - similarities, similarities - neg_margin).relu_()
    excess[:, rows].fill_diagonal_(0)
    return excess, same_class
