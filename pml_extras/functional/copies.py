"""Which references are the very sample that is compared with them."""

from __future__ import annotations

import torch
from torch import Tensor

from ._precision import full_precision


@full_precision
def exact_copies(embeddings: Tensor, ref_emb: Tensor) -> Tensor:
    """Which references equal which embeddings to the last bit, as a memory bank's newest rows do.

    Args:
        embeddings: (N, D), any floating dtype.
        ref_emb: (R, D), any floating dtype.

    Returns:
        (N, R) bool.

    Example:
        >>> import torch
        >>> exact_copies(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 2.0], [2.0, 1.0]]))
        tensor([[ True, False]])
    """
    # (N, R, D) comparisons would take D times the memory, and sorting the rows would make the host
    # wait for a GPU.
    return row_fingerprints(embeddings)[:, None] == row_fingerprints(ref_emb)


@full_precision
def row_fingerprints(x: Tensor) -> Tensor:
    """(N,) int64, for (N, D) floats: a hash of the bits of each row."""
    bits = x.detach().contiguous()
    bits = bits.view(torch.int64 if x.dtype == torch.float64 else torch.int32)
    # Each value is mixed with its place before the sum (splitmix64): multiples of the bits alone
    # would leave the sign, the highest bit, where a second change of sign undoes it.
    place = torch.arange(x.shape[1], device=x.device)
    mixed = bits.long() + (place + 1) * -7046029254386353131
    for odd in (-4658895280553007687, -7723592293110705685):
        mixed = (mixed ^ (mixed >> 31)) * odd
    return (mixed ^ (mixed >> 31)).sum(1)
