"""Detection of wrong labels by the votes of neighbors."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ._contextual import contextual_similarity_matrix
from ._kernels.precision import full_precision
from ._weighted_label_vote import TIE_TOLERANCE

CLASSES_PER_CHUNK = 128  # whose votes are counted at a time
MAX_NEIGHBORS = 40  # more take longer and change little


class LabelVote(NamedTuple):
    """The result of :func:`label_vote`, one value per sample."""

    vote_lift: Tensor
    """(N,), the fraction of the vote for the sample's own class, divided by the fraction expected
    by chance for a class of this size. Below 1, the neighbors contradict the label. 1 without
    evidence: without votes, or without another sample of the class."""
    vote_margin: Tensor
    """(N,) in [-1, 1], the fraction of the vote for the sample's own class minus that for the class
    with the most votes among the others. Below 0, the label is outvoted. 0 without evidence."""
    suggested_label: Tensor
    """(N,), the label with the most votes; the sample's own unless it is outvoted."""

    @property
    def is_issue(self) -> Tensor:
        """(N,) bool, whether the label is outvoted and gets less of the vote than by chance."""
        return (self.vote_lift < 1) & (self.vote_margin < 0)


@full_precision
@torch.no_grad()
def label_vote(
    embeddings: Tensor, labels: Tensor, *, num_neighbors: int | None = None
) -> LabelVote:
    """Let all samples of a set vote on each other's labels, weighted by contextual similarity.

    Args:
        embeddings: (N, D) of any scale, compared by cosine similarity.
        labels: (N,) integers.
        num_neighbors: k >= 1 of the contextual similarity, including the sample itself. Larger is
            more reliable, until it exceeds the number of samples per class. Default: chosen for
            each sample from the class sizes: nine tenths of that of the median sample, or of that
            of its own class if this is less than half as large, and at most 40.

    Returns:
        A :class:`LabelVote`. An N x N matrix is made only if that is faster: for small sets or
        large neighborhoods, and on a CPU without MKL. The neighbor search takes O(N² D)
        operations, counting the votes for C classes O(N k C).

    Source: ours, based on the contextual similarity of arXiv 2210.01908.

    Example:
        >>> import torch
        >>> x = torch.tensor([[1.0, 0.0]] * 4 + [[0.0, 1.0]] * 4)
        >>> labels = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1])
        >>> label_vote(x, labels).suggested_label
        tensor([0, 0, 0, 0, 1, 1, 1, 1])
    """
    n, device = len(embeddings), embeddings.device
    if n == 0:
        return LabelVote(embeddings.new_empty(0), embeddings.new_empty(0), labels.clone())
    normalized = normalize(embeddings)
    similarity = contextual_similarity_matrix(
        lambda rows: -normalized[rows] @ normalized.T,
        normalized,
        num_neighbors=class_size_neighbors(labels) if num_neighbors is None else num_neighbors,
    )
    self_similarity = similarity.diagonal()[:, None]
    classes, target, class_sizes = torch.unique(labels, return_inverse=True, return_counts=True)
    target_votes, total = normalized.new_zeros(2, n)
    most_votes, winner = normalized.new_zeros(n), target  # among the other classes
    for chunk in torch.split(torch.arange(len(classes), device=device), CLASSES_PER_CHUNK):
        one_hot = (target[:, None] == chunk).to(normalized.dtype)
        # S Y without the votes of the samples for themselves; rounding can leave less than 0.
        votes = (similarity @ one_hot - self_similarity * one_hot).clamp_min_(0)
        target_votes += (votes * one_hot).sum(1)
        total += votes.sum(1)
        chunk_votes, chunk_winner = votes.masked_fill_(one_hot > 0, 0).max(1)
        winner = torch.where(chunk_votes > most_votes, chunk[chunk_winner], winner)
        most_votes = torch.maximum(most_votes, chunk_votes)
    has_evidence = (total > 0) & (class_sizes[target] > 1)
    margin = (target_votes - most_votes) / total
    is_outvoted = has_evidence & (margin < -TIE_TOLERANCE)
    chance = (class_sizes[target] - 1).clamp_min(1).to(total.dtype) / max(n - 1, 1)
    return LabelVote(
        torch.where(has_evidence, target_votes / total / chance, 1),
        torch.where(is_outvoted | (has_evidence & (margin > 0)), margin, 0),
        classes[torch.where(is_outvoted, winner, target)],
    )


def class_size_neighbors(labels: Tensor) -> Tensor:
    """(N,) int64: a number of neighbors per sample, at most 40, from the sizes of the classes.

    It is nine tenths of the class size of the median sample. A sample of a class that is less than
    half as large takes that of its own class, because the votes of other classes would outnumber
    those of its own.
    """
    _, target, class_sizes = torch.unique(labels, return_inverse=True, return_counts=True)
    size = class_sizes[target]
    median = size.median()
    # Nine tenths, because wrong labels make some classes look larger than they are. A neighborhood
    # that is larger than its cluster takes in all samples that are equally far away.
    return (torch.where(2 * size >= median, median, size) * 9 // 10).clamp(2, MAX_NEIGHBORS)
