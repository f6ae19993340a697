"""Square sparse matrices, as thin a layer as serves over torch's CSR and its fast products."""

from __future__ import annotations

import functools
import warnings
from typing import NamedTuple

import torch
from torch import Tensor


class Sparse(NamedTuple):
    """An n x n matrix: its entries by row, and by column within a row, none of them twice."""

    rows: Tensor
    cols: Tensor
    values: Tensor
    n: int

    def __matmul__(self, other: Sparse) -> Sparse:
        return _from_csr(_csr(self) @ _csr(other))

    def times_dense(self, dense: Tensor) -> Tensor:
        product: Tensor = _csr(self) @ dense
        return product

    def plus(self, other: Sparse) -> Sparse:
        return _from_csr(_csr(self) + _csr(other))

    def transposed(self) -> Sparse:
        return _ordered(self.cols, self.rows, self.values, self.n)

    def with_values(self, values: Tensor) -> Sparse:
        return self._replace(values=values)

    def at(self, rows: Tensor, cols: Tensor) -> Tensor:
        """The entries at these places, 0 where there is none."""
        keys, wanted = self.rows * self.n + self.cols, rows * self.n + cols
        place = torch.searchsorted(keys, wanted).clamp_max(len(keys) - 1)
        return torch.where(keys[place] == wanted, self.values[place], 0)

    def entries_of(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows (the first of them is 0), columns and values, for rows that follow one another."""
        start, end = torch.searchsorted(self.rows, rows[[0, -1]] + rows.new_tensor([0, 1])).tolist()
        return self.rows[start:end] - rows[0], self.cols[start:end], self.values[start:end]

    def dense_rows(self, rows: Tensor) -> Tensor:
        """(B, n), for B rows that follow one another."""
        i, j, values = self.entries_of(rows)
        dense = values.new_zeros(len(rows), self.n)
        dense[i, j] = values
        return dense

    def row_sums(self) -> Tensor:
        return self.values.new_zeros(self.n).index_add_(0, self.rows, self.values)


def same_class(numbers: Tensor, value: Tensor) -> Sparse:
    """The pairs of samples with equal class numbers, which run from 0 without gaps."""
    n = len(numbers)
    order = numbers.argsort()
    sizes = torch.bincount(numbers)
    first = sizes.cumsum(0) - sizes
    rows, place = ranges(first[numbers], sizes[numbers])
    cols = order[place]
    keys = (rows * n + cols).sort().values
    return Sparse(keys // n, keys % n, value.expand(len(keys)), n)


def ranges(first: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """arange(f, f + s) for each f of first and s of sizes, one after another: which range each
    number is of, and the numbers."""
    which = torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes)
    start = first - (sizes.cumsum(0) - sizes)
    return which, start[which] + torch.arange(len(which), device=sizes.device)


def _ordered(rows: Tensor, cols: Tensor, values: Tensor, n: int) -> Sparse:
    order = (rows * n + cols).argsort()
    return Sparse(rows[order], cols[order], values[order], n)


def _csr(matrix: Sparse) -> Tensor:
    _hear_that_it_is_in_beta()
    ends = torch.bincount(matrix.rows, minlength=matrix.n).cumsum(0)
    return torch.sparse_csr_tensor(
        torch.cat([ends.new_zeros(1), ends]),
        matrix.cols,
        matrix.values,
        (matrix.n, matrix.n),
        check_invariants=False,
    )


def _from_csr(matrix: Tensor) -> Sparse:
    per_row = matrix.crow_indices().diff()
    rows = torch.arange(len(per_row), device=per_row.device).repeat_interleave(per_row)
    # The columns of a product come in any order.
    return _ordered(rows, matrix.col_indices(), matrix.values(), len(per_row))


@functools.cache
def _hear_that_it_is_in_beta() -> None:
    """Torch says so once a process: here, unheard, rather than to the user."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.zeros(1, 1).to_sparse_csr()
