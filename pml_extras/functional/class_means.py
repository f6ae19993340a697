"""Moving averages of the embeddings of each class."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize as unit


def moving_class_means(
    means: Tensor,
    counts: Tensor,
    embeddings: Tensor,
    labels: Tensor,
    momentum: float,
    normalize: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""What the classes of a batch are averaged to after it.

    .. math:: m_c \leftarrow \beta\,m_c + (1-\beta)\,\mathrm{mean}_{i: y_i = c}\,x_i

    and the batch's mean alone where the class has no mean yet. With ``normalize``, the batch's
    means and the result are unit vectors. Rows that are not finite are passed over.

    Args:
        means: (C, D).
        counts: (C,) int64, how many embeddings each class was averaged from; 0: none yet.
        embeddings: (N, D).
        labels: (N,) int64 in [0, C).
        momentum: :math:`\beta` in [0, 1].
        normalize: whether the averages live on the unit sphere.

    Returns:
        (N, D) and (N,), the new mean and count of class ``labels[i]`` in row i, equal to the last
        bit in all rows of a class and whatever the order of the batch. To apply them:
        ``means[labels], counts[labels] = moving_class_means(...)``.

    Example:
        >>> import torch
        >>> x, y = torch.tensor([[1.0], [3.0], [5.0]]), torch.tensor([0, 0, 1])
        >>> moving_class_means(torch.zeros(2, 1), torch.tensor([0, 7]), x, y, momentum=0.5)
        (tensor([[2.0000],
                [2.0000],
                [2.5000]]), tensor([2, 2, 8]))
    """
    batch_means, batch_counts = _batch_class_means(embeddings.detach().to(means.dtype), labels)
    if normalize:
        batch_means = unit(batch_means)
    old, old_counts = means.index_select(0, labels), counts[labels]
    kept = torch.where(old_counts > 0, momentum, 0.0).to(means.dtype)
    new = torch.lerp(batch_means.to(means.dtype), old, kept[:, None])
    if normalize:
        new = unit(new)
    return torch.where((batch_counts > 0)[:, None], new, old), old_counts + batch_counts


def _batch_class_means(embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The batch's mean, float64, and number of finite rows of class ``labels[i]``, in row i."""
    n = len(labels)
    # One number a class, below n; rows that are not finite are summed up apart, as number n.
    slot = torch.searchsorted(labels.sort().values, labels.contiguous())
    largest = embeddings.abs().amax(1)
    summed_as = torch.where(largest.isfinite(), slot, n)
    largest = largest.new_zeros(n + 1).scatter_reduce_(0, summed_as, largest, "amax")
    # Sums of floating-point numbers depend on the order of the rows, and under
    # DistributedLossWrapper each rank sees another order. Sums of whole numbers below 2^53 do not:
    # so many steps up to the class's largest value that n of them stay below that.
    bits = 52 - n.bit_length()
    shift = (bits - torch.frexp(largest).exponent).clamp_max(1000)
    steps = torch.ldexp(largest.new_ones(n + 1, dtype=torch.double), shift)
    whole = (embeddings * steps[summed_as, None]).round_()
    sums = whole.new_zeros(n + 1, embeddings.shape[1]).index_add_(0, summed_as, whole)
    counts = labels.new_zeros(n + 1).index_add_(0, summed_as, torch.ones_like(labels))
    divisor = steps * counts.clamp_min(1)
    return sums.index_select(0, slot).div_(divisor[slot, None]), counts[slot]
