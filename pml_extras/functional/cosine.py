"""Cosine similarities, accurate whatever the precision of the inputs."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import normalize

from ._precision import full_precision


@full_precision
def pairwise_cosine(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Cosine similarity of each row of ``x`` with each row of ``y``.

    Args:
        x: (N, D), any floating dtype.
        y: (R, D); ``x`` itself if not given.

    Returns:
        (N, R) in [-1, 1], float32 or wider. A zero row has similarity 0 with everything.

    Example:
        >>> import torch
        >>> pairwise_cosine(torch.tensor([[2.0, 0.0], [0.0, 3.0]]))
        tensor([[1., 0.],
                [0., 1.]])
    """
    x_unit = normalize(x)
    return x_unit @ (x_unit if y is None else normalize(y)).T
