"""Square sparse matrices: a thin layer over torch's CSR format and its fast products."""

from __future__ import annotations

import functools
import warnings
from typing import NamedTuple

import torch
from torch import Tensor


class SparseMatrix(NamedTuple):
    """An n x n matrix. Entries are sorted by row, then by column, without duplicates."""

    rows: Tensor
    cols: Tensor
    values: Tensor
    n: int

    def __matmul__(self, other: SparseMatrix) -> SparseMatrix:
        return _from_csr(_to_csr(self) @ _to_csr(other))

    def matmul_dense(self, dense: Tensor) -> Tensor:
        return _to_csr(self) @ dense

    def plus(self, other: SparseMatrix) -> SparseMatrix:
        return _from_csr(_to_csr(self) + _to_csr(other))

    def transpose(self) -> SparseMatrix:
        return _sorted(self.cols, self.rows, self.values, self.n)

    def with_values(self, values: Tensor) -> SparseMatrix:
        return self._replace(values=values)

    def at(self, rows: Tensor, cols: Tensor) -> Tensor:
        """The entries at these positions, 0 where nothing is stored."""
        keys, wanted = self.rows * self.n + self.cols, rows * self.n + cols
        position = torch.searchsorted(keys, wanted).clamp_max(len(keys) - 1)
        return torch.where(keys[position] == wanted, self.values[position], 0)

    def row_sums(self) -> Tensor:
        return self.values.new_zeros(self.n).index_add_(0, self.rows, self.values)


def same_class_matrix(class_index: Tensor, value: Tensor) -> SparseMatrix:
    """The matrix with a scalar ``value`` at all (i, j) of the same class, i = j included."""
    n, sizes = len(class_index), torch.bincount(class_index)
    num_same, first = sizes[class_index], (sizes.cumsum(0) - sizes)[class_index]
    rows = torch.arange(n, device=sizes.device).repeat_interleave(num_same)
    # Samples sorted by class: each row takes its class's range of positions.
    starts = first - (num_same.cumsum(0) - num_same)
    position = starts[rows] + torch.arange(len(rows), device=sizes.device)
    cols = class_index.argsort(stable=True)[position]
    return SparseMatrix(rows, cols, value.expand(len(rows)), n)


def _sorted(rows: Tensor, cols: Tensor, values: Tensor, n: int) -> SparseMatrix:
    order = (rows * n + cols).argsort()
    return SparseMatrix(rows[order], cols[order], values[order], n)


def _to_csr(matrix: SparseMatrix) -> Tensor:
    _suppress_beta_warning()
    n = matrix.n
    row_starts = torch.bincount(matrix.rows + 1, minlength=n + 1).cumsum(0)
    entries = row_starts, matrix.cols, matrix.values
    return torch.sparse_csr_tensor(*entries, (n, n), check_invariants=False)


def _from_csr(matrix: Tensor) -> SparseMatrix:
    per_row = matrix.crow_indices().diff()
    rows = torch.arange(len(per_row), device=per_row.device).repeat_interleave(per_row)
    # A product's columns are not sorted.
    return _sorted(rows, matrix.col_indices(), matrix.values(), len(per_row))


@functools.cache
def _suppress_beta_warning() -> None:
    """torch warns once per process that CSR is in beta: trigger the warning here, unseen."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.zeros(1, 1).to_sparse_csr()
