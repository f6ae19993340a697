"""Detection of wrong labels by the votes of neighbors."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ._contextual import contextual_similarity_matrix
from ._kernels.precision import full_precision
from ._weighted_label_vote import TIE_TOLERANCE

CLASSES_PER_CHUNK = 128  # whose votes are counted at a time


class LabelVote(NamedTuple):
    """The result of :func:`label_vote`, one value per sample."""

    vote_lift: Tensor
    """(N,), the fraction of the vote for the sample's own class, divided by the fraction expected
    by chance for a class of this size. Below 1, the neighbors contradict the label. 1 without
    votes."""
    is_plurality: Tensor
    """(N,) bool, whether no other class gets more votes."""
    suggested_label: Tensor
    """(N,), the label with the most votes; the sample's own if ``is_plurality``."""


@full_precision
@torch.no_grad()
def label_vote(embeddings: Tensor, labels: Tensor, *, num_neighbors: int = 40) -> LabelVote:
    """Let all samples of a set vote on each other's labels, weighted by contextual similarity.

    Args:
        embeddings: (N, D) of any scale, compared by cosine similarity.
        labels: (N,) integers.
        num_neighbors: k >= 1 of the contextual similarity, including the sample itself. Larger is
            more reliable, until it exceeds the number of samples per class.

    Returns:
        A :class:`LabelVote`. An N x N matrix is made only if that is faster: for small sets or
        large neighborhoods, and on a CPU without MKL. The neighbor search takes O(N² D)
        operations, counting the votes for C classes O(N k C).

    Source: ours, based on the contextual similarity of arXiv 2210.01908.

    Example:
        >>> import torch
        >>> x = torch.tensor([[1.0, 0.0]] * 4 + [[0.0, 1.0]] * 4)
        >>> labels = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1])
        >>> label_vote(x, labels, num_neighbors=3).suggested_label
        tensor([0, 0, 0, 0, 1, 1, 1, 1])
    """
    n, device = len(embeddings), embeddings.device
    if n == 0:
        return LabelVote(embeddings.new_empty(0), labels > 0, labels.clone())
    normalized = normalize(embeddings)
    similarity = contextual_similarity_matrix(
        lambda rows: -normalized[rows] @ normalized.T, normalized, num_neighbors=num_neighbors
    )
    self_similarity = similarity.diagonal()[:, None]
    classes, target, class_sizes = torch.unique(labels, return_inverse=True, return_counts=True)
    target_votes, total = normalized.new_zeros(2, n)
    most_votes, winner = normalized.new_full((n,), -torch.inf), target
    for chunk in torch.split(torch.arange(len(classes), device=device), CLASSES_PER_CHUNK):
        one_hot = (target[:, None] == chunk).to(normalized.dtype)
        # S Y without the votes of the samples for themselves; rounding can leave less than 0.
        votes = (similarity @ one_hot - self_similarity * one_hot).clamp_min_(0)
        target_votes += (votes * one_hot).sum(1)
        total += votes.sum(1)
        chunk_votes, chunk_winner = votes.max(1)
        winner = torch.where(chunk_votes > most_votes, chunk[chunk_winner], winner)
        most_votes = torch.maximum(most_votes, chunk_votes)
    is_plurality = target_votes >= most_votes - TIE_TOLERANCE * total
    chance = (class_sizes[target] - 1).clamp_min(1) / max(n - 1, 1)
    vote_lift = torch.where(total > 0, target_votes / total / chance, 1)
    return LabelVote(vote_lift, is_plurality, classes[torch.where(is_plurality, target, winner)])
