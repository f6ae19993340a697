"""Which references are the same sample as an embedding."""

import torch
from torch import Tensor

from .precision import full_precision


@full_precision
def self_match_mask(embeddings: Tensor, ref_emb: Tensor) -> Tensor:
    """Which references equal which embeddings bit by bit, as the newest rows of a memory bank do.

    Args:
        embeddings: (N, D), any floating dtype.
        ref_emb: (R, D), any floating dtype.

    Returns:
        (N, R) bool. Rows are compared by 64-bit hashes: different rows match with a probability of
        about N R / 2^64.

    Example:
        >>> import torch
        >>> self_match_mask(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 2.0], [2.0, 1.0]]))
        tensor([[ True, False]])
    """
    # Comparing the rows takes an (N, R, D) tensor; sorting them makes the host wait for a GPU.
    return row_hashes(embeddings)[:, None] == row_hashes(ref_emb)


@full_precision
def row_hashes(x: Tensor) -> Tensor:
    """(N,) int64: a hash of the bits of each row of (N, D) floats."""
    bits = x.detach().contiguous()
    bits = bits.view(torch.int64 if x.dtype == torch.float64 else torch.int32)
    # Each value is mixed with its column, and the row is summed. Without mixing, rows with the same
    # values in a different order would match. The constants are those of splitmix64, as signed
    # integers.
    column = torch.arange(x.shape[1], device=x.device)
    mixed = bits.long() + (column + 1) * -0x61C8864680B583EB
    for odd in (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15):
        mixed = (mixed ^ (mixed >> 31)) * odd
    return (mixed ^ (mixed >> 31)).sum(1)
