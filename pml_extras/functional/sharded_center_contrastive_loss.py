"""Center Contrastive Loss with the classes spread over the ranks of a process group."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ._collectives import Group, all_reduced, copy_to_ranks, logsumexp_over_ranks, sum_over_ranks
from ._precision import full_precision
from .center_contrastive_loss import SeenCosines, losses_from_sums, sum_seen_cosines
from .negative_logsumexp import negative_logsumexp


@full_precision
def sharded_center_contrastive_loss(
    embeddings: Tensor,
    centers: Tensor,
    labels: Tensor,
    first_class: int,
    scale: float = 16.0,
    margin: float = 0.2,
    center_weight: float = 1.5,
    label_smoothing: float = 0.0,
    seen: Tensor | None = None,
    group: Group = None,
) -> Tensor:
    """:func:`center_contrastive_loss`, of which each rank of a process group has some classes.

    Every rank calls it with the same embeddings and gets the same losses: those of one process that
    has all classes. No rank ever has more than its own classes' logits, a chunk at a time. What
    goes between the ranks is each sample's log-sum-exp and its cosine with its own center, and in
    the backward pass the gradient of the embeddings: (N, D) numbers, however many classes there
    are.

    In a backward pass from a loss that is the same on all ranks, the gradients of the embeddings
    and of the centers are those of one process.

    Args:
        embeddings: (N, D), any floating dtype and scale; equal on all ranks, N > 0.
        centers: (C_r, D), the centers of this rank's classes; C_r may be 0.
        labels: (N,) int64 in [0, C), with C the sum of all C_r; equal on all ranks.
        first_class: this rank's classes are first_class to first_class + C_r - 1.
        seen: (C_r,) bool, of this rank's classes. Default: all take part.
        group: the ranks. Default: all.

    The settings and the result, (N,), are as in :func:`center_contrastive_loss`.

    Source: that of :func:`center_contrastive_loss`; the division into ranks is ours.
    """
    embeddings = copy_to_ranks(embeddings, group)
    held = (first_class <= labels) & (labels < first_class + len(centers))
    own_class = (labels - first_class).where(held, 0)
    if len(centers) == 0:
        # One class that takes no part stands for none. The rank does all that the others do, since
        # they wait for it.
        centers, seen = pad(centers, (0, 0, 0, 1)), labels.new_zeros(1, dtype=torch.bool)
    total, own = negative_logsumexp(embeddings, centers, own_class, scale, seen, held)
    seen_cosines = None
    if label_smoothing > 0:
        part = sum_seen_cosines(embeddings, centers, own_class, seen)
        seen_cosines = SeenCosines(
            sum_over_ranks(part.total, group),
            all_reduced(part.number, "sum", group),
            all_reduced((part.own & held).long(), "sum", group) > 0,
        )
    return losses_from_sums(
        logsumexp_over_ranks(total, group),
        sum_over_ranks(own, group),
        seen_cosines,
        scale,
        margin,
        center_weight,
        label_smoothing,
    )
