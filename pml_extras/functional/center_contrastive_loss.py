"""Center Contrastive Loss (arXiv 2308.00458)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize, softplus

from ._precision import full_precision
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
    own_logit = scale * (own - margin)
    # Not cross_entropy: there the loss of an easy sample is the difference of two nearly equal
    # numbers, and nothing is left of it in float32 at s = 64. (The default threshold of softplus,
    # 20, is too low for float64 gradients.)
    losses = softplus(total - own_logit, threshold=80)
    if label_smoothing > 0:
        # With L = -log softmax_y(z), -log softmax_j(z) = L + z_y - z_j. Averaged over j, which are
        # the seen classes and the sample's own:
        x, c = normalize(embeddings), normalize(centers)
        if seen is None:
            seen = torch.ones(len(c), dtype=torch.bool, device=c.device)
        own_seen = seen[labels]
        sum_logits = scale * (x @ (c * seen[:, None]).sum(0))
        sum_logits = sum_logits + torch.where(own_seen, -scale * margin, own_logit)
        mean_logit = sum_logits / (seen.sum() + ~own_seen)
        losses = losses + label_smoothing * (own_logit - mean_logit)
    return losses + center_weight * (2 - 2 * own)
