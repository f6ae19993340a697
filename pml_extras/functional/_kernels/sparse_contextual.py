"""The contextual similarity and the contextual term of a batch in sparse matrices.

Neighborhoods have few members, so the matrices and their products have few entries per row. No
dense (N, N) matrix is made, except by ``to_dense``.

    M, M'   neighborhoods of k and of k // 2     c   row sums of M
    G       M M^T, shared neighbors              H   overlap, from G and c
    W       H * M                                R   M' * M'^T, reciprocal neighbors
    r       row sums of R                        J   (R / r) W
    S       (J + J^T) / 2                        Y   1 for pairs of the same class
    dX      gradient of the loss with respect to X

``*`` is the element-wise product, and R / r divides row i by r_i. docs/contextual-gradient.md
derives the gradient.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._neighborhoods import (
    STEP_SLOPE,
    NumNeighbors,
    knn_radii,
    neighborhood_overlap,
    neighbors_of_rows,
    self_nearest,
    squared_distances,
)
from .chunks import IndexBuffer, row_chunks
from .csr import SparseMatrix, same_class_matrix
from .precision import kernel_backward

CHUNK_NUMEL = 1 << 21  # distances computed at a time
# Sparse products are faster if a batch is this many times larger than neighborhoods and classes.
MIN_SPARSITY = 60
# On a GPU, smaller batches are faster dense: sparse products make the host wait.
MIN_SAMPLES_ON_GPU = 8192

DistanceRows = Callable[[slice], Tensor]
"""Returns the distances, (B, N), of a slice of B samples to all N."""


def sparse_contextual_term(normalized: Tensor, labels: Tensor, k: int, slack: float) -> Tensor:
    """The contextual term, (N,), of normalized embeddings (N, D) with labels (N,)."""
    return _SparseContextualTerm.apply(normalized, labels, k, slack)  # type: ignore[no-any-return, no-untyped-call]


@torch.no_grad()
def prefers_sparse(
    distance_rows: DistanceRows,
    num_neighbors: NumNeighbors,
    slack: float,
    samples: Tensor,
    labels: Tensor | None = None,
) -> bool:
    """Whether sparse matrices are faster: neighborhoods, and classes if given, are small.

    Args:
        distance_rows: the distances between the samples.
        samples: (N, ...), for their number and device.
        labels: (N,).
    """
    n, device = len(samples), samples.device
    gpu_minimum = MIN_SAMPLES_ON_GPU if device.type == "cuda" else 0
    largest_k = num_neighbors if isinstance(num_neighbors, int) else int(num_neighbors.max())
    min_samples = max(largest_k * MIN_SPARSITY, gpu_minimum)
    if n < min_samples or torch.compiler.is_compiling():  # compiled code cannot branch on values
        return False
    # torch's products of CSR matrices on a CPU need MKL.
    if device.type != "cuda" and not torch.backends.mkl.is_available():  # type: ignore[no-untyped-call]
        return False
    rows = slice(0, n, n // 16)  # about 16 rows; n is at least MIN_SPARSITY here
    distances = self_nearest(distance_rows(rows), torch.arange(n, device=device)[rows])
    radius, _ = knn_radii(distances, neighbors_of_rows(num_neighbors, rows), slack)
    sizes = [(distances <= radius).sum(1).double().mean()]
    if labels is not None:
        class_sizes = torch.unique(labels, return_counts=True)[1].double()
        sizes.append(class_sizes.square().sum() / n)  # the mean over the samples
    return float(max(sizes)) * MIN_SPARSITY < n


def squared_distance_rows(normalized: Tensor) -> DistanceRows:
    return lambda rows: squared_distances(normalized[rows] @ normalized.T)


class SparseContextualSimilarity:
    """The contextual similarity S of n samples without slack, with a part of Tensor's interface.

    S is the symmetric part of J = (R / r) W, and only the sparse factors are kept.
    """

    def __init__(
        self, distance_rows: DistanceRows, num_neighbors: NumNeighbors, samples: Tensor
    ) -> None:
        knn_mask, in_half = _knn_matrix(distance_rows, num_neighbors, 0.0, samples)
        _, _, reciprocal, weights = _matrices(knn_mask, in_half)
        self._mean_weights, self._weights = _row_normalized(reciprocal), weights  # R / r, W
        self._mean_weights_t, self._weights_t = self._mean_weights.transpose(), weights.transpose()

    def to_dense(self) -> Tensor:
        similarity = _symmetric_part(self._mean_weights @ self._weights)
        dense = similarity.values.new_zeros(similarity.n, similarity.n)
        dense[similarity.rows, similarity.cols] = similarity.values
        return dense

    def __matmul__(self, x: Tensor) -> Tensor:
        """S x, (n, C), by products with the factors of J and of J^T."""
        context = self._mean_weights.matmul_dense(self._weights.matmul_dense(x))
        context_t = self._weights_t.matmul_dense(self._mean_weights_t.matmul_dense(x))
        return (context + context_t) / 2

    def diagonal(self) -> Tensor:
        """(n,): the row sums of (R / r) * W^T."""
        i, j = self._mean_weights.rows, self._mean_weights.cols
        values = self._mean_weights.values * self._weights.at(j, i)
        return self._mean_weights.with_values(values).row_sums()


def _knn_matrix(
    distance_rows: DistanceRows, num_neighbors: NumNeighbors, slack: float, samples: Tensor
) -> tuple[SparseMatrix, Tensor]:
    """M, and a mask of its entries that lie in the neighborhoods of k // 2 as well."""
    n, device = len(samples), samples.device
    mean_k = float(torch.as_tensor(num_neighbors).clamp(max=n).double().mean())
    found = IndexBuffer(round(2 * mean_k * n), device)
    self_index = torch.arange(n, device=device)
    for rows in row_chunks(n, n, CHUNK_NUMEL):
        distances = self_nearest(distance_rows(rows), self_index[rows])
        k = neighbors_of_rows(num_neighbors, rows)
        radius, half_radius = knn_radii(distances, k, slack)
        i, j = (distances <= radius).nonzero(as_tuple=True)
        in_half = distances[i, j] <= half_radius[i, 0]
        # Packed into one integer, so that one buffer holds row, column and in_half.
        found.append(((i + rows.start) * n + j) * 2 + in_half)
    keys, in_half = found.result() // 2, found.result() % 2 == 1
    ones = torch.ones(len(keys), dtype=distances.dtype, device=device)
    return SparseMatrix(keys // n, keys % n, ones, n), in_half


def _matrices(
    knn_mask: SparseMatrix, in_half: Tensor
) -> tuple[SparseMatrix, SparseMatrix, SparseMatrix, SparseMatrix]:
    """M', G = M M^T, R and W, from M."""
    n, rows, cols = knn_mask.n, knn_mask.rows, knn_mask.cols
    i, j = rows[in_half], cols[in_half]
    half_knn_mask = SparseMatrix(i, j, knn_mask.values[in_half], n)
    mutual = half_knn_mask.at(j, i) > 0
    reciprocal = SparseMatrix(i[mutual], j[mutual], half_knn_mask.values[mutual], n)
    shared, size = knn_mask @ knn_mask.transpose(), knn_mask.row_sums()
    overlap = neighborhood_overlap(shared.at(rows, cols), size[rows], size[cols], n)
    return half_knn_mask, shared, reciprocal, knn_mask.with_values(overlap)


def _row_normalized(reciprocal: SparseMatrix) -> SparseMatrix:
    """R / r."""
    return reciprocal.with_values(1 / reciprocal.row_sums()[reciprocal.rows])


def _symmetric_part(context: SparseMatrix) -> SparseMatrix:
    """S = (J + J^T) / 2."""
    total = context.plus(context.transpose())
    return total.with_values(total.values / 2)


class _SparseContextualTerm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, labels: Tensor, k: int, slack: float) -> Tensor:
        n = len(x)
        knn_mask, in_half = _knn_matrix(squared_distance_rows(x), k, slack, x)
        half_knn_mask, shared, reciprocal, weights = _matrices(knn_mask, in_half)
        context = _symmetric_part(_row_normalized(reciprocal) @ weights)

        # sum_j (S - Y)^2 = sum_j Y^2 + sum over the entries of S of ((S - Y)^2 - Y^2). Y^2 = Y, and
        # its sum without j = i is the class size - 1.
        _, class_index, class_sizes = torch.unique(labels, return_inverse=True, return_counts=True)
        i, j = context.rows, context.cols
        same_class = (labels[i] == labels[j]).to(x.dtype)
        errors = ((context.values - same_class).square() - same_class).masked_fill(i == j, 0)
        losses = context.with_values(errors).row_sums() + (class_sizes[class_index] - 1)

        matrices = (knn_mask, half_knn_mask, shared, reciprocal, weights, context)
        tensors = [t for m in matrices for t in (m.rows, m.cols, m.values)]
        ctx.save_for_backward(x, class_index, *tensors)
        return losses / n  # type: ignore[no-any-return]

    @staticmethod
    @kernel_backward
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, class_index, *tensors = ctx.saved_tensors
        n = len(x)
        knn_mask, half_knn_mask, shared, reciprocal, weights, context = (
            SparseMatrix(tensors[i], tensors[i + 1], tensors[i + 2], n)
            for i in range(0, len(tensors), 3)
        )
        size, num_reciprocal = knn_mask.row_sums(), reciprocal.row_sums()  # c, r: (N,)

        # L = sum g_i (S - Y)^2 / N with g = grad_output gives dJ = (g_i + g_j) (S - Y) / N off the
        # diagonal, and d(R W) = dJ / r_i
        errors = context.plus(same_class_matrix(class_index, x.new_tensor(-1.0)))
        i, j = errors.rows, errors.cols
        pair_grads = (grad_output[i] + grad_output[j]) / (n * num_reciprocal[i])
        grad_product = errors.with_values((errors.values * pair_grads).masked_fill(i == j, 0))

        # dW = R^T d(R W), and R is symmetric
        grad_weights = reciprocal @ grad_product
        # dR = B - rowsum(R * B) / r with B = d(R W) W^T; the second part comes from 1 / r
        grad_factor = grad_product @ weights.transpose()  # B
        i, j = reciprocal.rows, reciprocal.cols
        row_means = reciprocal.with_values(grad_factor.at(i, j)).row_sums() / num_reciprocal
        # dM'^T = M' * (dR + dR^T), which has the entries of M'
        i, j = half_knn_mask.rows, half_knn_mask.cols
        grad_half_knn_t = half_knn_mask.with_values(
            grad_factor.at(i, j) - row_means[i] + grad_factor.at(j, i) - row_means[j]
        )

        # dH = dW * M. H = (G / c_i + (N - c_i - c_j + G) / (N - c_i)) / 2; denominators have no
        # gradient
        i, j = knn_mask.rows, knn_mask.cols
        half_grad_overlap = grad_weights.at(i, j) / 2
        grad_size_terms = knn_mask.with_values(half_grad_overlap / (n - size).clamp_min(1)[i])
        # dc_i collects both places of c, as c_i and as c_j
        grad_size = -(grad_size_terms.row_sums() + grad_size_terms.transpose().row_sums())
        # dG collects both fractions
        grad_shared = knn_mask.with_values(half_grad_overlap / size[i] + grad_size_terms.values)
        # dM = dW * H + (dG + dG^T) M + dc_i; the last part follows below
        i, j = grad_weights.rows, grad_weights.cols
        overlap = neighborhood_overlap(shared.at(i, j), size[i], size[j], n)
        grad_knn = grad_weights.with_values(grad_weights.values * overlap)
        grad_knn = grad_knn.plus(grad_shared.plus(grad_shared.transpose()) @ knn_mask)

        # D = 2 - 2 s and dD = slope (dM + dM'), so ds = -2 slope (dM + dM') off the diagonal. The
        # factor follows in the last line. The clamp of D needs no gradient: it only acts on
        # parallel vectors, where normalize has none. dx = (ds + ds^T) x, so dM'^T may replace dM'.
        grad_steps = grad_knn.plus(grad_half_knn_t)
        i, j = grad_steps.rows, grad_steps.cols
        grad_steps = grad_steps.with_values(grad_steps.values.masked_fill(i == j, 0))
        grad_x = grad_steps.plus(grad_steps.transpose()).matmul_dense(x)
        # dc_i is a part of all entries of row i off the diagonal. The products of this part and of
        # its transpose with x need no matrix.
        grad_x += grad_size[:, None] * (x.sum(0) - x)
        grad_x += grad_size @ x - grad_size[:, None] * x
        return -2 * STEP_SLOPE * grad_x, None, None, None
