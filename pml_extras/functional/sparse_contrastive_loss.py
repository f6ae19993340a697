"""The contrastive term without a matrix of all similarities."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._function import Function
from ._precision import full_precision
from ._sparse import Sparse, same_class
from .cosine import unit_rows
from .sparse_context import blocks


@full_precision
def sparse_contrastive_loss(
    embeddings: Tensor, labels: Tensor, pos_margin: float = 0.75, neg_margin: float = 0.6
) -> Tensor:
    r"""As :func:`contrastive_loss` over all pairs of a batch, for batches in which classes are
    small.

    The similarities are worked out a few rows at a time, and again in backward, where both samples
    of a pair are served at once. With :math:`g_i` from above, and :math:`n^-` active pairs, the
    negative part is

    .. math:: \hat x_i = \frac{N}{n^-} \sum_{j:\, y_j \ne y_i,\, s_{ij} > m^-} (g_i + g_j)\,x_j

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
    if len(embeddings) == 0:
        return embeddings.sum(1)
    unit = unit_rows(embeddings)
    same = same_class(torch.unique(labels, return_inverse=True)[1], unit.new_ones(()))
    losses: Tensor = _AllPairs.apply(unit, same, pos_margin, neg_margin)  # type: ignore[no-untyped-call]
    return losses


class _AllPairs(Function):
    @staticmethod
    def forward(
        ctx: Any, unit: Tensor, same: Sparse, pos_margin: float, neg_margin: float
    ) -> Tensor:
        positive_sums, negative_sums = unit.new_zeros(2, len(unit))
        active = unit.new_zeros(2)
        for rows in blocks(len(unit), len(unit), unit.device):
            i, _, positive, negative = _excess(unit, same, rows, pos_margin, neg_margin)
            positive_sums.index_add_(0, rows[i], positive)
            negative_sums[rows] = negative.sum(1)
            active += torch.stack([positive.count_nonzero(), negative.count_nonzero()])
        shares = len(unit) / active.clamp_min_(1)
        ctx.save_for_backward(unit, shares, same.rows, same.cols, same.values)
        ctx.margins = pos_margin, neg_margin
        losses: Tensor = positive_sums * shares[0] + negative_sums * shares[1]
        return losses

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "sparse_contrastive_loss cannot be differentiated twice: use contrastive_loss"
            )
        unit, shares, i, j, ones = ctx.saved_tensors
        same = Sparse(i, j, ones, len(unit))
        by_unit = torch.empty_like(unit)
        for rows in blocks(len(unit), len(unit), unit.device):
            i, j, positive, negative = _excess(unit, same, rows, *ctx.margins)
            by_pairs = (upstream[rows, None] + upstream).mul_(shares[1])
            by_pairs.masked_fill_(negative <= 0, 0)
            of_both = upstream[rows[i]] + upstream[j]
            by_pairs[i, j] = -shares[0] * of_both * (positive > 0)
            by_unit[rows] = by_pairs @ unit
        return by_unit, None, None, None


def _excess(
    unit: Tensor, same: Sparse, rows: Tensor, pos_margin: float, neg_margin: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows (the first of them is 0) and columns of the pairs of one class, and how far each lies
    below its margin; (B, N) how far the other pairs lie above theirs."""
    similarities = unit[rows] @ unit.T
    i, j, _ = same.entries_of(rows)
    positive = (pos_margin - similarities[i, j]).relu_().masked_fill_(rows[i] == j, 0)
    similarities[i, j] = -2  # below any margin
    return i, j, positive, similarities.sub_(neg_margin).relu_()
