"""Cosine similarity."""

from torch import Tensor
from torch.nn.functional import normalize

from ._kernels.precision import full_precision, pairwise_dot


@full_precision
def pairwise_cosine(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Cosine similarity of each row of ``x`` with each row of ``y``.

    Args:
        x: (N, D), any floating dtype and scale.
        y: (R, D). Default: ``x``.

    Returns:
        (N, R) in [-1, 1], float32 or wider. A zero row has similarity 0 with everything.

    Example:
        >>> import torch
        >>> pairwise_cosine(torch.tensor([[2.0, 0.0], [0.0, 3.0]]))
        tensor([[1., 0.],
                [0., 1.]])
    """
    x = normalize(x)
    return pairwise_dot(x, x if y is None else normalize(y))
