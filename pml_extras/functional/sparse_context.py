"""The contextual similarity of a batch with itself, in sparse matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._parts import parts
from ._sparse import Sparse, ranges
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
    near, is_nearest = _neighborhoods(distances, n, k, slack, device)
    shared = near @ near.transposed()
    members, both = near.row_sums(), shared.at(near.rows, near.cols)
    nearest, reciprocal, opinion = _opinions(near, is_nearest, members, both)
    degree = reciprocal.row_sums()
    context = _both_ways(_average(reciprocal, degree) @ opinion)
    return SparseContext(near, nearest, shared, reciprocal, opinion, context, members, degree)


def context_rows(distances: Distances, n: int, k: int, device: torch.device) -> Distances:
    """The rows of the contextual similarity without slack, by their numbers."""
    k = min(k, n)
    if _sparse_pays_forward(distances, n, k, device):
        friends, opinion = _friends_and_opinions(distances, n, k, device)
        return _both_ways(friends @ opinion).dense_rows
    return _dense_context(distances, n, k, device).__getitem__


class ContextSums(NamedTuple):
    """What sums over the contextual similarity S without slack take, S itself not being made."""

    times: Callable[[Tensor], Tensor]
    """From (N, C) to S times it, (N, C)."""
    diagonal: Tensor
    """(N,), each sample's similarity with itself."""


def context_sums(distances: Distances, n: int, k: int, device: torch.device) -> ContextSums:
    """The sums over the contextual similarity of n samples with each other."""
    k = min(k, n)
    if not _sparse_pays_forward(distances, n, k, device):
        context = _dense_context(distances, n, k, device)
        return ContextSums(context.__matmul__, context.diagonal())
    friends, opinion = _friends_and_opinions(distances, n, k, device)
    i, j = friends.rows, friends.cols
    diagonal = friends.with_values(friends.values * opinion.at(j, i)).row_sums()
    back, opinion_back = friends.transposed(), opinion.transposed()

    def times(x: Tensor) -> Tensor:
        forth = friends.times_dense(opinion.times_dense(x))
        return (forth + opinion_back.times_dense(back.times_dense(x))) / 2

    return ContextSums(times, diagonal)


def _neighborhoods(
    distances: Distances, n: int, k: int, slack: float, device: torch.device
) -> tuple[Sparse, Tensor]:
    """The samples in each one's neighbourhood of k, and which lie in that of k // 2 too."""
    found = Growing(2 * k * n, device)
    for rows in blocks(n, n, device):
        block = distances(rows)
        is_near, is_nearest = neighborhoods(block, rows, k, slack)
        row, col = is_near.nonzero(as_tuple=True)
        found.append((rows[row] * n + col) * 2 + is_nearest[row, col])
    keys, is_nearest = found.numbers() // 2, found.numbers() % 2 == 1
    ones = torch.ones(len(keys), dtype=block.dtype, device=device)
    return Sparse(keys // n, keys % n, ones, n), is_nearest


def _friends_and_opinions(
    distances: Distances, n: int, k: int, device: torch.device
) -> tuple[Sparse, Sparse]:
    """R, its rows divided by their sums, and W: what S is made of, where nothing goes backward."""
    near, is_nearest = _neighborhoods(distances, n, k, 0.0, device)
    _, reciprocal, opinion = _opinions(near, is_nearest, near.row_sums(), _count_shared(near))
    return _average(reciprocal, reciprocal.row_sums()), opinion


def _count_shared(near: Sparse) -> Tensor:
    """How many samples the neighbourhoods of a sample and of each in its own have in common."""
    n, rows, cols = near.n, near.rows, near.cols
    sizes = torch.bincount(rows, minlength=n)
    first = sizes.cumsum(0) - sizes
    counts = torch.empty_like(near.values)
    for some in blocks(n, n, rows.device):
        start, end = int(first[some[0]]), int(first[some[-1]] + sizes[some[-1]])
        is_near = torch.zeros(len(some), n, dtype=torch.bool, device=rows.device)
        is_near[rows[start:end] - some[0], cols[start:end]] = True
        # Among duplicates, neighbourhoods can be as large as the set.
        step = max(1, BLOCK // max(sizes[cols[start:end]].tolist(), default=1))
        for at in range(start, end, step):
            row, col = rows[at : min(at + step, end)] - some[0], cols[at : min(at + step, end)]
            pair, place = ranges(first[col], sizes[col])
            common = is_near.view(-1)[row[pair] * n + cols[place]].to(counts)
            counts[at : at + len(col)] = counts.new_zeros(len(col)).index_add_(0, pair, common)
    return counts


def _opinions(
    near: Sparse, is_nearest: Tensor, members: Tensor, shared: Tensor
) -> tuple[Sparse, Sparse, Sparse]:
    """M^2, R and W, from M, its row sums, and how many neighbours its pairs share."""
    rows, cols = near.rows, near.cols
    i, j = rows[is_nearest], cols[is_nearest]
    nearest = Sparse(i, j, near.values[is_nearest], near.n)
    mutual = nearest.at(j, i) > 0
    reciprocal = Sparse(i[mutual], j[mutual], nearest.values[mutual], near.n)
    opinion = near.with_values(agreement(shared, members[rows], members[cols], near.n))
    return nearest, reciprocal, opinion


def _average(reciprocal: Sparse, degree: Tensor) -> Sparse:
    return reciprocal.with_values(1 / degree[reciprocal.rows])


def _both_ways(context: Sparse) -> Sparse:
    context = context.plus(context.transposed())
    return context.with_values(context.values / 2)


def _dense_context(distances: Distances, n: int, k: int, device: torch.device) -> Tensor:
    return contextual_similarity_from_distances(distances(torch.arange(n, device=device)), k)


def _sparse_pays_forward(distances: Distances, n: int, k: int, device: torch.device) -> bool:
    size = neighborhood_size(distances, n, k, 0.0, device, FORWARD_SPARSITY)
    return size * FORWARD_SPARSITY < n


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
    found = parts(n, num_references, BLOCK)
    return (torch.arange(rows.start, rows.stop, device=device) for rows in found)
