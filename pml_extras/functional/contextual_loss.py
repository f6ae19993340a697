"""The three terms of the contextual loss (arXiv 2210.01908)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize, relu

from ._precision import full_precision
from .contextual_similarity import contextual_similarity


@full_precision
def contextual_loss(
    similarities: Tensor,
    labels: Tensor,
    num_neighbors: int = 4,
    slack: float = 0.05,
    ref_similarities: Tensor | None = None,
    ref_labels: Tensor | None = None,
    copies: Tensor | None = None,
) -> Tensor:
    r"""Squared error of the contextual similarity as a prediction of "same class".

    .. math:: \ell_i = \frac1R \sum_j (S_{ij} - [y_i = y_j])^2

    over all references j but the sample itself, with S from :func:`contextual_similarity`.

    Args:
        similarities: (N, N) cosine similarities of the batch with itself, its own references; or
            (N, R), with references, when ``ref_similarities`` and ``ref_labels`` are given.
        labels: (N,).
        num_neighbors: k >= 1, the sample itself included; clamped to R.
        slack: eps >= 0, in units of squared distance between unit vectors.
        ref_similarities: (R, R) cosine similarities of the references with themselves.
        ref_labels: (R,).
        copies: (N, R) bool, which references are the sample itself. Default: none is.

    Returns:
        (N,) losses in [0, 1]; their mean is the published term.

    Source: arXiv 2210.01908. References are ours.

    Example:
        >>> import torch
        >>> from pml_extras.functional import pairwise_cosine
        >>> x = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
        >>> contextual_loss(pairwise_cosine(x), torch.tensor([0, 0, 1, 1]), num_neighbors=2)
        tensor([0., 0., 0., 0.])
    """
    context = contextual_similarity(similarities, num_neighbors, slack, ref_similarities)
    ref_labels = labels if ref_labels is None else ref_labels
    errors = context - (labels[:, None] == ref_labels).to(context.dtype)
    if ref_similarities is None:
        errors = errors.fill_diagonal_(0)
    elif copies is not None:
        errors = errors.masked_fill(copies, 0)
    return errors.square().sum(1) / len(ref_labels)


@full_precision
def contrastive_loss(
    similarities: Tensor,
    positives: Tensor,
    negatives: Tensor,
    pos_margin: float = 0.75,
    neg_margin: float = 0.6,
) -> Tensor:
    """Pull positive pairs above one similarity and push negative pairs below another.

    Each of the two parts is a mean over its active pairs, those on the wrong side of the margin.

    Args:
        similarities: (N, R) cosine similarities.
        positives, negatives: (N, R) bool, or how many times each pair counts.
        pos_margin, neg_margin: in units of cosine similarity.

    Returns:
        (N,) losses, each anchor's share; their mean is the published term.

    Source: arXiv 2210.01908, the authors' code.

    Example:
        >>> import torch
        >>> similarities = torch.tensor([[1.0, 0.5], [0.5, 1.0]])
        >>> pair = torch.tensor([[False, True], [True, False]])
        >>> contrastive_loss(similarities, positives=pair, negatives=~pair & False)
        tensor([0.2500, 0.2500])
    """

    def mean_over_active(excess: Tensor, pairs: Tensor) -> Tensor:
        num_active = torch.where(excess > 0, pairs, 0).sum().to(excess.dtype)
        return (excess * pairs).sum(1) * (len(excess) / num_active.clamp_min(1))

    return mean_over_active(relu(pos_margin - similarities), positives) + mean_over_active(
        relu(similarities - neg_margin), negatives
    )


@full_precision
def mean_similarity_loss(
    embeddings: Tensor, target: float = 0.25, ref_emb: Tensor | None = None
) -> Tensor:
    r"""Squared distance of the batch's mean cosine similarity, self pairs included, from a target.

    Args:
        embeddings: (N, D), any scale.
        target: in [-1, 1].
        ref_emb: (R, D), what the embeddings are compared with; default: themselves.

    Returns:
        () the loss.

    Source: arXiv 2210.01908, the authors' code.

    Example:
        >>> import torch
        >>> mean_similarity_loss(torch.eye(2), target=0.25)
        tensor(0.0625)
    """
    # The mean of all dot products is the dot product of the means.
    mean = normalize(embeddings).mean(0)
    ref_mean = mean if ref_emb is None else normalize(ref_emb).mean(0)
    return (mean @ ref_mean - target).square()
