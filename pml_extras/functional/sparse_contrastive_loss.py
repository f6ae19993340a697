"""The contrastive term without a matrix of all similarities."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize, relu

from ._precision import full_precision
from ._sparse import Sparse, same_class
from .sparse_context import blocks


@full_precision
def sparse_contrastive_loss(
    embeddings: Tensor, labels: Tensor, pos_margin: float = 0.75, neg_margin: float = 0.6
) -> Tensor:
    r"""As :func:`contrastive_loss` over all pairs of a batch, for batches in which classes are
    small.

    Positive pairs are listed. The similarities of the others are worked out a few rows at a time,
    and again in backward, where both rows of a pair are served at once: with the share
    :math:`g_i / n` of row i in what comes from above of n active pairs,

    .. math:: \hat x_i = \frac1n \sum_{j:\, s_{ij} > m^-} (g_i + g_j)\,x_j

    It cannot be differentiated twice.

    Args:
        embeddings: (N, D), any scale.
        labels: (N,).
        pos_margin, neg_margin: in units of cosine similarity.

    Returns:
        (N,) losses, each anchor's share; their mean is the published term.

    Source: arXiv 2210.01908, the authors' code; this way to it is ours.

    Example:
        >>> import torch
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> sparse_contrastive_loss(x, torch.tensor([0, 0]))
        tensor([0.7500, 0.7500])
    """
    unit, n = normalize(embeddings), len(embeddings)
    pairs = same_class(torch.unique(labels, return_inverse=True)[1], unit.new_ones(()))
    i, j = pairs.rows, pairs.cols
    excess = relu(pos_margin - (unit[i] * unit[j]).sum(1)).masked_fill(i == j, 0)
    num_active = (excess > 0).to(excess.dtype).sum()
    positive = pairs.with_values(excess).row_sums() * (n / num_active.clamp_min(1))
    negative: Tensor = _NegativePairs.apply(unit, pairs, neg_margin)  # type: ignore[no-untyped-call]
    return positive + negative


class _NegativePairs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, unit: Tensor, same: Sparse, margin: float) -> Tensor:
        sums, num_active = unit.new_empty(len(unit)), unit.new_zeros(())
        for rows in blocks(len(unit), len(unit), unit.device):
            excess = _excess(unit, same, rows, margin).relu_()
            sums[rows] = excess.sum(1)
            num_active += excess.count_nonzero()
        share = len(unit) / num_active.clamp_min_(1)
        ctx.save_for_backward(unit, share)
        ctx.same, ctx.margin = same, margin
        return sums * share

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "sparse_contrastive_loss cannot be differentiated twice: use contrastive_loss"
            )
        unit, share = ctx.saved_tensors
        upstream = upstream * share
        by_unit = torch.empty_like(unit)
        for rows in blocks(len(unit), len(unit), unit.device):
            active = _excess(unit, ctx.same, rows, ctx.margin) > 0
            by_pairs = (upstream[rows, None] + upstream).masked_fill_(~active, 0)
            by_unit[rows] = by_pairs @ unit
        return by_unit, None, None


def _excess(unit: Tensor, same: Sparse, rows: Tensor, margin: float) -> Tensor:
    """(B, N): how far similarities lie above the margin; below it, for pairs of one class."""
    excess = (unit[rows] @ unit.T).sub_(margin)
    i, j, _ = same.entries_of(rows)
    excess[i, j] = -1
    return excess
