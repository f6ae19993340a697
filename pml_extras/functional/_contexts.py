"""The contexts of samples: which others belong to their neighborhoods, as sparse rows.

    M_ij = 1 if j is one of the k nearest neighbors of i, i included
    A = M * M^T      k-reciprocal neighbors; each row is divided by its sum
    E_ij = 1 / h if j is one of the h = k / 3 nearest neighbors of i    local query expansion
    V = E E A        the contexts; each row is divided by its length

``*`` is the element-wise product. Each expansion keeps the 4 k largest weights of a row. Samples of
one class have similar contexts: S = V V^T is the contextual similarity of re-ranking.
"""

from typing import NamedTuple

from torch import Tensor

from ._kernels.sparse_rows import CSR, from_lists, normalize_rows, product

WEIGHTS_PER_NEIGHBOR = 4


class Contexts(NamedTuple):
    """Sparse (R, R) matrices of R references, one row per reference."""

    reciprocal: CSR
    """A."""
    expanded: CSR
    """E A."""
    contexts: CSR
    """V = E E A, with rows of length 1."""


def expansion_size(k: int) -> int:
    """h, including the sample itself."""
    return max(round(k / 3), 1)


def reference_contexts(neighbors: Tensor, is_neighbor: Tensor) -> Contexts:
    """The contexts of references from their nearest neighbors, (R, k), themselves first.

    ``is_neighbor``, (R, k) bool, is false where fewer than k were found.
    """
    num_references, k = neighbors.shape
    size, max_weights = expansion_size(k), WEIGHTS_PER_NEIGHBOR * k
    knn = from_lists(neighbors, is_neighbor, num_references)  # M
    reciprocal = normalize_rows(knn.multiply(knn.T).tocsr())
    expansion = from_lists(neighbors[:, :size], is_neighbor[:, :size] / size, num_references)
    expanded = product(expansion, reciprocal, max_weights)
    contexts = normalize_rows(product(expansion, expanded, max_weights), order=2)
    return Contexts(reciprocal, expanded, contexts)


def query_contexts(
    references: Contexts, neighbors: Tensor, is_neighbor: Tensor, is_reciprocal: Tensor
) -> CSR:
    """V of queries that are not among the references, (Q, R), each as one more sample.

    Args:
        references: the contexts of the references.
        neighbors: (Q, k), the nearest references.
        is_neighbor: (Q, k) bool, false where fewer than k were found.
        is_reciprocal: (Q, k) bool, whether the query is as near as their own k nearest neighbors.
    """
    num_references = references.reciprocal.shape[0]
    k = neighbors.shape[1]
    size = expansion_size(k)
    reciprocal = normalize_rows(from_lists(neighbors, is_reciprocal, num_references))
    # The query itself and h - 1 others
    others = from_lists(neighbors[:, : size - 1], is_neighbor[:, : size - 1], num_references)
    expanded = (reciprocal + others @ references.reciprocal) / size
    return normalize_rows(expanded + others @ references.expanded, order=2)
