"""Sparse matrices on the CPU whose rows are short lists, and the largest entries of their products.

SciPy's products release Python's global lock, so chunks of rows are computed in several threads.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from .chunks import row_chunks

CSR: TypeAlias = Any  # scipy.sparse.csr_array of float32; SciPy has no type annotations
CHUNK_ROWS = 512


def from_lists(columns: Tensor, values: Tensor, num_columns: int) -> CSR:
    """A matrix with the positive ``values`` at the ``columns`` of each row, both (N, k)."""
    is_entry = values > 0
    row_starts = torch.cat([torch.zeros(1, dtype=torch.long), is_entry.sum(1).cpu()]).cumsum(0)
    entries = (x.cpu().numpy() for x in (values[is_entry].float(), columns[is_entry], row_starts))
    return sparse.csr_array(tuple(entries), shape=(len(columns), num_columns))


def normalize_rows(matrix: CSR, order: int = 1) -> CSR:
    """Divide each row of non-negative entries by its sum (order 1) or its length (order 2)."""
    norms = matrix.power(order).sum(axis=1) ** (1 / order)
    return sparse.diags_array((1 / np.maximum(norms, 1e-30)).astype(np.float32)) @ matrix


def keep_largest(matrix: CSR, k: int) -> CSR:
    """The matrix with the k largest entries of each row."""
    sizes = np.diff(matrix.indptr)
    kept = np.ones(matrix.nnz, dtype=bool)
    for row in np.flatnonzero(sizes > k):
        start, end = matrix.indptr[row], matrix.indptr[row + 1]
        smallest = np.argpartition(matrix.data[start:end], end - start - k)[: end - start - k]
        kept[start + smallest] = False
    row_starts = np.concatenate([[0], np.minimum(sizes, k).cumsum()])
    return sparse.csr_array((matrix.data[kept], matrix.indices[kept], row_starts), matrix.shape)


def product(left: CSR, right: CSR, k: int) -> CSR:
    """The k largest entries of each row of a product."""
    chunks = _map_chunks(left.shape[0], lambda rows: keep_largest(left[rows] @ right, k))
    return sparse.vstack(chunks, format="csr")


def mask_entries_(mask: NDArray[np.bool_], matrix: CSR) -> CSR:
    """Remove the entries where the dense mask is true, in place."""
    row_of_entry = np.repeat(np.arange(len(mask)), np.diff(matrix.indptr))
    matrix.data[mask[row_of_entry, matrix.indices]] = 0
    matrix.eliminate_zeros()
    return matrix


def sorted_entries(num_rows: int, rows_of: Callable[[slice], CSR], k: int) -> tuple[Tensor, Tensor]:
    """The k largest entries of each row, in descending order, and their columns: (N, k) each.

    Rows of fewer entries end with the value 0 and the column -1.

    Args:
        rows_of: returns a slice of the rows, so that not all rows exist at the same time.
    """

    def entries(rows: slice) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        largest = keep_largest(rows_of(rows), k)
        is_entry = np.arange(k) < np.diff(largest.indptr)[:, None]
        values, columns = np.zeros(is_entry.shape, np.float32), np.full(is_entry.shape, -1)
        values[is_entry], columns[is_entry] = largest.data, largest.indices
        order = np.argsort(-values, axis=1, kind="stable")
        return np.take_along_axis(values, order, 1), np.take_along_axis(columns, order, 1)

    chunks = _map_chunks(num_rows, entries)
    values, columns = (torch.from_numpy(np.concatenate(c)) for c in zip(*chunks, strict=True))
    return values, columns


def _map_chunks(num_rows: int, function: Callable[[slice], Any]) -> list[Any]:
    """The results of a function for chunks of rows, in several threads."""
    chunks = row_chunks(num_rows, 1, CHUNK_ROWS)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return list(pool.map(function, chunks))
