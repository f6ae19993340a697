"""Center Contrastive Loss (arXiv 2308.00458)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ._precision import full_precision
from .cosine import unit_rows
from .negative_logsumexp import negative_logsumexp


@full_precision
def center_contrastive_loss(
    embeddings: Tensor,
    centers: Tensor,
    labels: Tensor,
    scale: float = 16.0,
    margin: float = 0.2,
    center_weight: float = 1.5,
    label_smoothing: float = 0.0,
    seen: Tensor | None = None,
) -> Tensor:
    r"""Contrast each embedding with the centers of all classes, and pull it to its own.

    With :math:`x_i` and :math:`c_j` the normalised embeddings and centers,
    :math:`z_{ij} = s\,x_i \cdot c_j` for :math:`j \ne y_i` and
    :math:`z_{iy_i} = s\,(x_i \cdot c_{y_i} - m)`,

    .. math:: \ell_i = -\log \mathrm{softmax}_{y_i}(z_i) + \lambda\,|x_i - c_{y_i}|^2

    where the squared distance is :math:`2 - 2\,x_i \cdot c_{y_i}`.

    Args:
        embeddings: (N, D), any floating dtype and scale.
        centers: (C, D), one row a class, any scale.
        labels: (N,) int64 in [0, C).
        scale: s > 0, the inverse temperature.
        margin: m >= 0, in units of cosine similarity.
        center_weight: :math:`\lambda` >= 0.
        label_smoothing: in [0, 1): mixes the one-hot target with the uniform one.
        seen: (C,) bool; classes marked False take no part in the softmax. Default: all do.

    Returns:
        (N,) losses, float32 or wider.

    Source: arXiv 2308.00458, Equation (5) as independent re-implementations state it, plus the
    constant :math:`2\lambda` that makes it non-negative. Label smoothing and ``seen`` are ours.

    Example:
        >>> import torch
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> center_contrastive_loss(x, torch.eye(2), torch.tensor([0, 1]))
        tensor([2.7608e-06, 2.7608e-06])
    """
    total, own = negative_logsumexp(embeddings, centers, labels, scale, seen)
    seen_cosines = sum_seen_cosines(embeddings, centers, labels, seen) if label_smoothing else None
    return losses_from_sums(total, own, seen_cosines, scale, margin, center_weight, label_smoothing)


class SeenCosines(NamedTuple):
    """What label smoothing needs to know of the classes that take part in the softmax."""

    total: Tensor  # (N,), the sum of each sample's cosines with their centers
    number: Tensor  # (), int64
    own: Tensor  # (N,) bool, whether the sample's own class is one of them


def sum_seen_cosines(
    embeddings: Tensor, centers: Tensor, labels: Tensor, seen: Tensor | None
) -> SeenCosines:
    """Sum up the classes that ``seen``, (C,) bool, marks: all, if it is None."""
    x, c = unit_rows(embeddings), unit_rows(centers)
    if seen is None:
        seen = torch.ones(len(c), dtype=torch.bool, device=c.device)
    return SeenCosines(x @ (c * seen[:, None]).sum(0), seen.sum(), seen[labels])


def losses_from_sums(
    total: Tensor,
    own: Tensor,
    seen_cosines: SeenCosines | None,
    scale: float,
    margin: float,
    center_weight: float,
    label_smoothing: float,
) -> Tensor:
    """The losses, (N,), from what :func:`negative_logsumexp` gives; sums over classes are over."""
    own_logit = scale * (own - margin)
    # Not cross_entropy: there the loss of an easy sample is the difference of two nearly equal
    # numbers, and nothing is left of it in float32 at s = 64. (The default threshold of softplus,
    # 20, is too low for float64 gradients.)
    losses = softplus(total - own_logit, threshold=80)
    if seen_cosines is not None:
        # With L = -log softmax_y(z), -log softmax_j(z) = L + z_y - z_j. Averaged over j, which are
        # the seen classes and the sample's own:
        sum_logits = scale * seen_cosines.total
        sum_logits = sum_logits + torch.where(seen_cosines.own, -scale * margin, own_logit)
        mean_logit = sum_logits / (seen_cosines.number + ~seen_cosines.own)
        losses = losses + label_smoothing * (own_logit - mean_logit)
    return losses.add(1 - own, alpha=2 * center_weight)
