"""What a sample's context says of its label."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._precision import full_precision
from .cosine import unit_rows
from .sparse_context import context_sums

CLASSES = 128  # whose votes to count in one go
ROUNDING = 1e-5  # the share of a vote that decides nothing between classes


class ClassVote(NamedTuple):
    """What a sample's context says of its label: one value a sample."""

    share: Tensor
    """Its class's share of the contextual similarity around it, in [0, 1]; 0.5 if there is none."""
    trusted: Tensor
    """Whether no other class has a larger share."""


def class_vote(context: Tensor, labels: Tensor, ref_labels: Tensor, excluded: Tensor) -> ClassVote:
    """Let the references vote on each sample's label, weighted by contextual similarity.

    Args:
        context: (N, R) contextual similarities.
        labels: (N,).
        ref_labels: (R,).
        excluded: (N, R) bool, who does not vote on whom: the sample itself.

    Example:
        >>> import torch
        >>> context = torch.tensor([[1.0, 0.6, 0.2], [0.6, 1.0, 0.0], [0.2, 0.0, 1.0]])
        >>> labels = torch.tensor([0, 0, 1])
        >>> class_vote(context, labels, labels, torch.eye(3, dtype=torch.bool))
        ClassVote(share=tensor([0.7500, 1.0000, 0.0000]), trusted=tensor([ True,  True, False]))
    """
    classes, numbers = torch.unique(torch.cat([labels, ref_labels]), return_inverse=True)
    own_class, ref_class = numbers[: len(labels), None], numbers[len(labels) :]
    votes = context.new_zeros(len(context), len(classes))
    votes.index_add_(1, ref_class, context.masked_fill(excluded, 0))
    own, total = votes.gather(1, own_class).squeeze(1), votes.sum(1)
    trusted = own >= votes.amax(1) - ROUNDING * total
    return ClassVote(torch.where(total > 0, own / total, 0.5), trusted)


class LabelVote(NamedTuple):
    """What a set of samples says of each other's labels: one value a sample."""

    support: Tensor
    """How many times the share that a class of this size has by chance its class gets of the vote;
    below 1 the context speaks against the label."""
    trusted: Tensor
    """Whether no other class gets more."""
    winner: Tensor
    """The label that gets most (any of several that get as much), or the sample's own if it does
    too, or if there is no vote."""


@full_precision
@torch.no_grad()
def label_vote(embeddings: Tensor, labels: Tensor, num_neighbors: int = 40) -> LabelVote:
    """Let all samples of a set vote on each other's labels, weighted by contextual similarity.

    Args:
        embeddings: (N, D), any scale, compared by their cosine. Those of a training set, say.
        labels: (N,) integers.
        num_neighbors: k >= 1 of the contextual similarity, the sample itself included. The more,
            the surer, as long as they are not many more than a class has samples.

    Returns:
        A :class:`LabelVote` of three (N,) tensors. No N x N matrix is made, unless neighbourhoods
        are a large part of the set. It takes a search for neighbours, N² D operations, and N k C
        to count the votes for C classes.

    Source: ours, on the contextual similarity of arXiv 2210.01908.

    Example:
        >>> import torch
        >>> x = torch.tensor([[1.0, 0.0]] * 4 + [[0.0, 1.0]] * 4)
        >>> label_vote(x, torch.tensor([0, 0, 0, 1, 1, 1, 1, 1]), num_neighbors=3).winner
        tensor([0, 0, 0, 0, 1, 1, 1, 1])
    """
    n, device = len(embeddings), embeddings.device
    if n == 0:
        return LabelVote(embeddings.new_empty(0), labels > 0, labels.clone())
    unit = unit_rows(embeddings)
    sums = context_sums(lambda rows: -unit[rows] @ unit.T, n, num_neighbors, device)
    labels_of, numbers, sizes = torch.unique(labels, return_inverse=True, return_counts=True)
    own, total = unit.new_zeros(n), unit.new_zeros(n)
    most, winner = unit.new_full((n,), -torch.inf), numbers
    for classes in torch.split(torch.arange(len(sizes), device=device), CLASSES):
        of_class = (numbers[:, None] == classes).to(unit.dtype)
        votes = sums.times(of_class) - sums.diagonal[:, None] * of_class
        votes.clamp_min_(0)  # which rounding may have missed
        own += (votes * of_class).sum(1)
        total += votes.sum(1)
        value, place = votes.max(1)
        winner = torch.where(value > most, classes[place], winner)
        most = torch.maximum(most, value)
    trusted = own >= most - ROUNDING * total
    by_chance = (sizes[numbers] - 1).clamp_min(1) / max(n - 1, 1)
    support = torch.where(total > 0, own / total / by_chance, 1)
    return LabelVote(support, trusted, labels_of[winner.where(~trusted, numbers)])
