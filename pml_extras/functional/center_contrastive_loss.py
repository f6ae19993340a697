"""Center Contrastive Loss (arXiv 2308.00458)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize, softplus

from ._precision import full_precision
from .negative_logsumexp import negative_logsumexp

# Up to this many logits, holding them all is no slower than working them out twice.
FEW_LOGITS = 1 << 20


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
    x = normalize(embeddings)
    if len(x) * len(centers) > FEW_LOGITS:
        total, own = negative_logsumexp(x, centers, labels, scale, seen)
    else:
        c = normalize(centers)
        own = c[labels]
        # The class's own column is masked with the lowest number rather than with -inf, whose
        # gradient is NaN where there is no other class.
        lowest = torch.finfo(x.dtype).min
        negative_logits = (scale * (x @ c.T)).scatter(1, labels[:, None], lowest)
        if seen is not None:
            negative_logits = negative_logits.masked_fill(~seen, lowest)
        total = negative_logits.logsumexp(1)
    seen_centers = sum_seen_centers(centers, labels, seen) if label_smoothing > 0 else None
    return losses_from_sums(
        x, own, total, scale, margin, center_weight, label_smoothing, seen_centers
    )


class SeenCenters(NamedTuple):
    """What label smoothing needs to know of the classes that take part in the softmax."""

    total: Tensor  # (D,), the sum of their normalised centers
    number: Tensor  # (), int64
    own: Tensor  # (N,) bool, whether each sample's own class is one of them


def sum_seen_centers(centers: Tensor, labels: Tensor, seen: Tensor | None) -> SeenCenters:
    """Sum up the classes marked in ``seen``; labels are in [0, C), or -1 for another class."""
    c = normalize(centers)
    if seen is None:
        seen = torch.ones(len(c), dtype=torch.bool, device=c.device)
    own = seen[labels.clamp_min(0)] & (labels >= 0)
    return SeenCenters((c * seen[:, None]).sum(0), seen.sum(), own)


def losses_from_sums(
    x: Tensor,
    own: Tensor,
    total: Tensor,
    scale: float,
    margin: float,
    center_weight: float,
    label_smoothing: float,
    seen_centers: SeenCenters | None,
) -> Tensor:
    """The losses, (N,), from what :func:`negative_logsumexp` gives.

    Args:
        x: (N, D), normalised embeddings.
        own: (N, D), their own classes' normalised centers.
        total: (N,), the log-sum-exp of the logits of all other classes.
        seen_centers: only label smoothing looks at it.
    """
    own_logit = scale * ((x * own).sum(1) - margin)
    # Not cross_entropy: there the loss of an easy sample is the difference of two nearly equal
    # numbers, and nothing is left of it in float32 at s = 64. (The default threshold of softplus,
    # 20, is too low for float64 gradients.)
    losses = softplus(total - own_logit, threshold=80)
    if seen_centers is not None:
        # With L = -log softmax_y(z), -log softmax_j(z) = L + z_y - z_j. Averaged over j, which are
        # the seen classes and the sample's own:
        sum_logits = scale * (x @ seen_centers.total)
        sum_logits = sum_logits + torch.where(seen_centers.own, -scale * margin, own_logit)
        mean_logit = sum_logits / (seen_centers.number + ~seen_centers.own)
        losses = losses + label_smoothing * (own_logit - mean_logit)
    return losses + center_weight * (x - own).square().sum(1)
