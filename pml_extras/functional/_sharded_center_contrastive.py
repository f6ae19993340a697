"""Center Contrastive Loss with the classes sharded over the ranks of a process group."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from ._center_contrastive import (
    ClassSums,
    logsumexp_of_negatives,
    losses_from_cosines,
    sum_class_cosines,
)
from ._distributed import (
    Group,
    all_reduce,
    all_reduce_logsumexp,
    all_reduce_sum,
    copy_to_parallel,
)
from ._kernels.precision import full_precision


@full_precision
def sharded_center_contrastive_loss(
    embeddings: Tensor,
    centers: Tensor,
    labels: Tensor,
    first_class: int,
    *,
    scale: float = 16.0,
    margin: float = 0.2,
    center_weight: float = 1.5,
    label_smoothing: float = 0.0,
    class_mask: Tensor | None = None,
    group: Group = None,
) -> Tensor:
    """:func:`center_contrastive_loss` where each rank of a process group has some of the classes.

    Every rank calls it with the same embeddings and gets the same losses, those of one process with
    all classes. A rank computes the logits of its own classes only, a chunk at a time. The ranks
    exchange each sample's log-sum-exp and target cosine, and in backward the gradient of the
    embeddings: (N, D) numbers, however many classes there are.

    If every rank calls backward on the same loss, the gradients of the embeddings and of the
    centers equal those of one process.

    Args:
        embeddings: (N, D), any floating dtype and scale; equal on all ranks, N > 0.
        centers: (C_r, D), the centers of this rank's classes; C_r may be 0.
        labels: (N,) int64 in [0, C), with C the sum of all C_r; equal on all ranks.
        first_class: this rank has the classes first_class to first_class + C_r - 1.
        class_mask: (C_r,) bool, of this rank's classes, as in :func:`center_contrastive_loss`.
        group: the process group. Default: all processes.

    The other hyperparameters and the result, (N,), are those of :func:`center_contrastive_loss`.

    Source: that of :func:`center_contrastive_loss`; sharding the classes is ours.
    """
    embeddings = copy_to_parallel(embeddings, group)
    is_local, local_labels = find_local_classes(labels, first_class, len(centers))
    if len(centers) == 0:
        # One masked class stands in for an empty shard, so that this rank joins all collectives.
        centers = pad(centers, (0, 0, 0, 1))
        class_mask = torch.zeros(1, dtype=torch.bool, device=labels.device)
    lse_of_negatives, target_cosine = logsumexp_of_negatives(
        embeddings, centers, local_labels, scale, class_mask, is_local
    )
    class_sums = None
    if label_smoothing:
        local = sum_class_cosines(embeddings, centers, local_labels, class_mask)
        class_sums = ClassSums(
            all_reduce_sum(local.cosines, group),
            all_reduce(local.num_classes, "sum", group),
            all_reduce((local.has_target & is_local).long(), "sum", group) > 0,
        )
    return losses_from_cosines(
        all_reduce_logsumexp(lse_of_negatives, group),
        all_reduce_sum(target_cosine, group),
        class_sums,
        scale,
        margin,
        center_weight,
        label_smoothing,
    )


def find_local_classes(labels: Tensor, first_class: int, num_classes: int) -> tuple[Tensor, Tensor]:
    """Which labels are of a rank's classes, (N,) bool, and their index among these, else 0."""
    local_labels = labels - first_class
    is_local = (local_labels >= 0) & (local_labels < num_classes)
    return is_local, torch.where(is_local, local_labels, 0)
