"""Center Contrastive Loss (arXiv 2308.00458)."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize, softplus

from ._kernels.logsumexp_of_negatives import chunked_logsumexp_of_negatives
from ._kernels.precision import full_precision, pairwise_dot

# Up to this many logits, plain autograd is as fast as the chunked implementation.
MAX_REFERENCE_LOGITS = 1 << 16

Implementation = Literal["auto", "chunked", "reference"]


@full_precision
def center_contrastive_loss(
    embeddings: Tensor,
    centers: Tensor,
    labels: Tensor,
    *,
    scale: float = 16.0,
    margin: float = 0.2,
    center_weight: float = 1.5,
    label_smoothing: float = 0.0,
    class_mask: Tensor | None = None,
    implementation: Implementation = "auto",
) -> Tensor:
    r"""Contrast each embedding with the centers of all classes, and pull it toward its own.

    With :math:`x_i` and :math:`c_j` the normalized embeddings and centers,
    :math:`z_{ij} = s\,x_i \cdot c_j` for :math:`j \ne y_i` and
    :math:`z_{iy_i} = s\,(x_i \cdot c_{y_i} - m)`,

    .. math:: \ell_i = -\log \mathrm{softmax}_{y_i}(z_i) + \lambda\,|x_i - c_{y_i}|^2

    where the squared distance is :math:`2 - 2\,x_i \cdot c_{y_i}`.

    Args:
        embeddings: (N, D), any floating dtype and scale.
        centers: (C, D), one row per class, any scale.
        labels: (N,) int64 in [0, C).
        scale: s > 0, the inverse temperature.
        margin: m >= 0, in units of cosine similarity.
        center_weight: :math:`\lambda` >= 0.
        label_smoothing: in [0, 1): mixes the one-hot target with the uniform distribution.
        class_mask: (C,) bool; classes marked False are not among the negatives. Default: all are. A
            sample's own class always takes part.
        implementation: "reference" is plain autograd on all logits. "chunked" computes a chunk of
            classes at a time, saves at most 2^24 numbers for backward, which recomputes the rest,
            and cannot be differentiated twice. "auto" takes "chunked" for more than 65,536 logits.

    Returns:
        (N,) losses, float32 or wider.

    Source: arXiv 2308.00458, Equation (5) as independent re-implementations state it, plus the
    constant :math:`2\lambda` that makes it non-negative. Label smoothing and ``class_mask`` are
    ours.

    Example:
        >>> import torch
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> center_contrastive_loss(x, torch.eye(2), torch.tensor([0, 1]))
        tensor([2.7608e-06, 2.7608e-06])
    """
    lse_of_negatives, target_cosine = logsumexp_of_negatives(
        embeddings, centers, labels, scale, class_mask, implementation=implementation
    )
    class_sums = None
    if label_smoothing:
        class_sums = sum_class_cosines(embeddings, centers, labels, class_mask)
    return losses_from_cosines(
        lse_of_negatives, target_cosine, class_sums, scale, margin, center_weight, label_smoothing
    )


class ClassSums(NamedTuple):
    """Sums over the classes of ``class_mask``, for label smoothing."""

    cosines: Tensor
    """(N,), the sum of each sample's cosines with the centers."""
    num_classes: Tensor
    """() int64."""
    has_target: Tensor
    """(N,) bool, whether the sample's class is one of them."""


def losses_from_cosines(
    lse_of_negatives: Tensor,
    target_cosine: Tensor,
    class_sums: ClassSums | None,
    scale: float,
    margin: float,
    center_weight: float,
    label_smoothing: float,
) -> Tensor:
    """The losses, (N,), from the results of :func:`logsumexp_of_negatives`, (N,) each."""
    target_logit = scale * (target_cosine - margin)
    # -log softmax_y(z) = log(1 + e^(lse_of_negatives - z_y)). For easy samples, cross_entropy would
    # subtract two nearly equal numbers. (The default threshold of softplus is too low for float64.)
    losses = softplus(lse_of_negatives - target_logit, threshold=80)
    if class_sums is not None:
        # mean_j(-log softmax_j(z)) = -log softmax_y(z) + z_y - mean_j z_j. The mean always includes
        # the sample's class, the only one with a margin.
        sum_cosine = class_sums.cosines + torch.where(class_sums.has_target, 0, target_cosine)
        num_classes = class_sums.num_classes + ~class_sums.has_target
        mean_logit = scale * (sum_cosine - margin) / num_classes
        losses = losses + label_smoothing * (target_logit - mean_logit)
    return losses + center_weight * (2 - 2 * target_cosine)


def logsumexp_of_negatives(
    embeddings: Tensor,
    centers: Tensor,
    labels: Tensor,
    scale: float,
    class_mask: Tensor | None = None,
    is_local: Tensor | None = None,
    *,
    implementation: Implementation = "auto",
) -> tuple[Tensor, Tensor]:
    r""":math:`\log\sum_{j \ne y_i} e^{s\cos(x_i, c_j)}` and :math:`\cos(x_i, c_{y_i})`, (N,) each.

    Without a negative class, the first result is lower than any logit can be.

    Args:
        embeddings: (N, D), any scale; a zero row has cosine 0 with everything.
        centers: (C, D), any scale.
        labels: (N,) int64 in [0, C).
        scale: s > 0.
        class_mask: (C,) bool; classes marked False are not among the negatives.
        is_local: (N,) bool; samples marked False belong to a class that is not among these C. No
            class is left out for them, and their target cosine is 0.
        implementation: as in :func:`center_contrastive_loss`.
    """
    if implementation == "auto":
        few = len(embeddings) * len(centers) <= MAX_REFERENCE_LOGITS
        implementation = "reference" if few else "chunked"
    if implementation not in ("chunked", "reference"):
        raise ValueError(f"unknown implementation {implementation!r}")
    if implementation == "chunked":
        return chunked_logsumexp_of_negatives(
            embeddings, centers, labels, scale, class_mask, is_local
        )
    cosines = pairwise_dot(normalize(embeddings), normalize(centers))  # (N, C)
    target = labels[:, None]
    target_cosine = cosines.gather(1, target).squeeze(1)
    logits = scale * cosines
    lowest = torch.finfo(logits.dtype).min  # -inf would give NaN without a negative class
    negative_logits = logits.scatter(1, target, lowest)
    if is_local is not None:
        negative_logits = torch.where(is_local[:, None], negative_logits, logits)
        target_cosine = target_cosine * is_local
    if class_mask is not None:
        negative_logits = negative_logits.masked_fill(~class_mask, lowest)
    return negative_logits.logsumexp(1), target_cosine


def sum_class_cosines(
    embeddings: Tensor, centers: Tensor, labels: Tensor, class_mask: Tensor | None
) -> ClassSums:
    """Sums over the classes of ``class_mask``, (C,) bool; over all classes if it is None."""
    if class_mask is None:
        class_mask = torch.ones(len(centers), dtype=torch.bool, device=centers.device)
    sum_of_centers = (normalize(centers) * class_mask[:, None]).sum(0)  # (D,)
    cosines = pairwise_dot(normalize(embeddings), sum_of_centers[None]).squeeze(1)
    return ClassSums(cosines, class_mask.sum(), class_mask[labels])
