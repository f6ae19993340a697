"""The contextual similarity of a batch with itself, in sparse matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._sparse import Sparse
from .contextual_similarity import (
    agreement,
    contextual_similarity_from_distances,
    neighborhoods,
)

# How many distances to look at in one go.
BLOCK = 1 << 21
# Where sparse products overtake dense ones on two CPU cores: in batches this many times larger than
# a neighbourhood. Backward, through neighbours of neighbours, takes more of it than forward.
SPARSITY, FORWARD_SPARSITY = 120, 60
SMALLEST_ON_GPU = 8192

Distances = Callable[[Tensor], Tensor]
"""Given the numbers of B samples, their distances (or what else) to all N: (B, N)."""


class SparseContext(NamedTuple):
    """The contextual similarity and what it is made of, as in :func:`contextual_similarity`."""

    near: Sparse  # M
    nearest: Sparse  # M^2
    shared: Sparse  # M M^T
    reciprocal: Sparse  # R
    opinion: Sparse  # W
    context: Sparse  # S
    members: Tensor  # c
    degree: Tensor  # the row sums of R

    def tensors(self) -> list[Tensor]:
        """What it is made of, for save_for_backward."""
        *matrices, members, degree = self
        return [t for m in matrices for t in (m.rows, m.cols, m.values)] + [members, degree]

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> SparseContext:
        """The inverse of :meth:`tensors`."""
        *entries, members, degree = tensors
        near, nearest, shared, reciprocal, opinion, context = (
            Sparse(entries[i], entries[i + 1], entries[i + 2], len(members))
            for i in range(0, len(entries), 3)
        )
        return cls(near, nearest, shared, reciprocal, opinion, context, members, degree)


def sparse_context(
    distances: Distances, n: int, k: int, slack: float, device: torch.device
) -> SparseContext:
    """The contextual similarity of n samples with each other, with k <= n neighbours."""
    found = Growing(2 * k * n, device)
    for rows in blocks(n, n, device):
        block = distances(rows)
        is_near, is_nearest = neighborhoods(block, rows, k, slack)
        row, col = is_near.nonzero(as_tuple=True)
        found.append((rows[row] * n + col) * 2 + is_nearest[row, col])
    keys, is_nearest = found.numbers() // 2, found.numbers() % 2 == 1
    rows, cols = keys // n, keys % n
    near = Sparse(rows, cols, torch.ones(len(rows), dtype=block.dtype, device=device), n)
    members = near.row_sums()
    shared = near @ near.transposed()

    i, j = rows[is_nearest], cols[is_nearest]
    nearest = Sparse(i, j, near.values[is_nearest], n)
    mutual = nearest.at(j, i) > 0
    reciprocal = Sparse(i[mutual], j[mutual], nearest.values[mutual], n)
    degree = reciprocal.row_sums()
    both = shared.at(rows, cols)
    opinion = near.with_values(agreement(both, members[rows], members[cols], len(members)))
    context = reciprocal.with_values(1 / degree[reciprocal.rows]) @ opinion
    context = context.plus(context.transposed())
    context = context.with_values(context.values / 2)
    return SparseContext(near, nearest, shared, reciprocal, opinion, context, members, degree)


def context_rows(distances: Distances, n: int, k: int, device: torch.device) -> Distances:
    """The rows of the contextual similarity without slack, by their numbers."""
    k = min(k, n)
    if neighborhood_size(distances, n, k, 0.0, device, FORWARD_SPARSITY) * FORWARD_SPARSITY < n:
        return sparse_context(distances, n, k, 0.0, device).context.dense_rows
    everything = distances(torch.arange(n, device=device))
    return contextual_similarity_from_distances(everything, k).__getitem__


def neighborhood_size(
    distances: Distances, n: int, k: int, slack: float, device: torch.device, sparsity: int
) -> float:
    """How many samples lie in a neighbourhood, measured on a sample of them; n where sparse
    matrices are out of the question: small and middling batches on a GPU are better served by dense
    products, which need no word from the host."""
    smallest = SMALLEST_ON_GPU if device.type == "cuda" else max(k, 1) * sparsity
    has_mkl = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    if n < smallest or not (device.type == "cuda" or has_mkl):
        return n
    rows = torch.arange(0, n, n // 16, device=device)
    is_near, _ = neighborhoods(distances(rows), rows, k, slack)
    return float(is_near.sum()) / len(rows)


class Growing:
    """Whole numbers, appended a few at a time to one piece of memory.

    Many small pieces, each allocated among the large ones of its block, would keep the allocator
    from using the places of these again: gigabytes of holes in a batch of 32,768.
    """

    def __init__(self, expected: int, device: torch.device) -> None:
        self._room = torch.empty(expected, dtype=torch.long, device=device)
        self._count = 0

    def append(self, numbers: Tensor) -> None:
        end = self._count + len(numbers)
        if end > len(self._room):
            self._room = torch.cat([self._room, self._room.new_empty(end)])
        self._room[self._count : end] = numbers
        self._count = end

    def numbers(self) -> Tensor:
        return self._room[: self._count]


def blocks(n: int, num_references: int, device: torch.device) -> Iterator[Tensor]:
    """The numbers of n samples, few enough at a time for their distances to all references."""
    size = max(1, BLOCK // num_references)
    return (torch.arange(i, min(n, i + size), device=device) for i in range(0, n, size))
