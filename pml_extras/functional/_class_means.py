"""Moving averages of the embeddings of each class."""

import torch
from torch import Tensor
from torch.nn.functional import normalize as normalize_rows


def moving_class_means(
    means: Tensor,
    counts: Tensor,
    embeddings: Tensor,
    labels: Tensor,
    *,
    momentum: float,
    normalize: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""The exponential moving averages (EMA) of the classes of a batch, after the batch.

    .. math:: m_c \leftarrow \beta\,m_c + (1-\beta)\,\mathrm{mean}_{i: y_i = c}\,x_i

    A class without a mean takes that of its samples in the batch. With ``normalize``, the class
    means of the batch and the results are normalized. Rows that are not finite are ignored.

    Args:
        means: (C, D).
        counts: (C,) int64, how many embeddings are in each mean; 0 means no mean.
        embeddings: (N, D).
        labels: (N,) int64 in [0, C).
        momentum: :math:`\beta` in [0, 1].
        normalize: whether the means are unit vectors.

    Returns:
        (N, D) and (N,): in row i the new mean and count of class ``labels[i]``. All rows of a class
        are equal bit by bit, whatever the order of the batch. Apply them with
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
        batch_means = normalize_rows(batch_means)
    old, old_counts = means.index_select(0, labels), counts[labels]
    beta = torch.where(old_counts > 0, momentum, 0.0).to(means.dtype)
    new = torch.lerp(batch_means.to(means.dtype), old, beta[:, None])
    if normalize:
        new = normalize_rows(new)
    return torch.where((batch_counts > 0)[:, None], new, old), old_counts + batch_counts


def _batch_class_means(embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The batch's mean (float64) and number of finite rows of class ``labels[i]``, in row i.

    Sums of floats depend on the order of the rows, and under DistributedLossWrapper each rank has
    a different order. So this is fixed-point accumulation: values become whole multiples of a step,
    and sums of integers below 2^53 are exact in float64.
    """
    n = len(labels)
    # Give each class of the batch a number below n. Rows that are not finite go to slot n.
    slot = torch.searchsorted(labels.sort().values, labels.contiguous())
    row_max = embeddings.abs().amax(1)
    sum_slot = torch.where(row_max.isfinite(), slot, n)
    class_max = row_max.new_zeros(n + 1).scatter_reduce_(0, sum_slot, row_max, "amax")
    # The step is a power of two such that n values of up to class_max stay below 2^53 steps.
    # It is at least 2^-1000, because 2^1000 is still finite in float64.
    bits = 52 - n.bit_length()
    shift = (bits - torch.frexp(class_max).exponent).clamp_max(1000)
    steps_per_unit = torch.ldexp(class_max.new_ones(n + 1, dtype=torch.double), shift)
    integers = (embeddings * steps_per_unit[sum_slot, None]).round_()
    sums = integers.new_zeros(n + 1, embeddings.shape[1]).index_add_(0, sum_slot, integers)
    counts = labels.new_zeros(n + 1).index_add_(0, sum_slot, torch.ones_like(labels))
    divisor = steps_per_unit * counts.clamp_min(1)
    return sums.index_select(0, slot).div_(divisor[slot, None]), counts[slot]
