"""Re-ranking of nearest neighbors by the similarity of contexts, without a dense matrix."""

from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import sparse
from torch import Tensor
from torch.nn.functional import normalize

from ._contexts import Contexts, query_contexts, reference_contexts
from ._kernels.precision import full_precision
from ._kernels.sparse_rows import CSR, from_lists, mask_entries_, sorted_entries
from ._knn_search import (
    Exclude,
    build_faiss_index,
    excluded_rows,
    knn_search,
    knn_search_without,
    move_to_front,
)

TIE_WEIGHT = 1e-3  # of the cosine similarity, which only decides between equal contexts


class ReferenceIndex(NamedTuple):
    """What re-ranking needs to know about R references."""

    embeddings: Tensor
    """(R, D), normalized."""
    num_neighbors: int
    """k."""
    neighbors: Tensor
    """(R, c >= k) int64, the nearest references by cosine similarity, the reference itself first.
    The first k are its neighbors; more are for references that become queries."""
    similarity: Tensor
    """(R, c), their cosine similarity; -inf where the search found fewer."""
    contexts: Contexts
    lookup: CSR
    """(2 R, R), the transposed contexts above the identity matrix."""
    faiss_index: Any
    """The faiss index that finds the neighbors of a query; None for an exact search."""

    @classmethod
    def from_neighbors(
        cls,
        embeddings: Tensor,
        num_neighbors: int,
        neighbors: Tensor,
        similarity: Tensor,
        faiss_index: Any = None,
    ) -> "ReferenceIndex":
        k = min(num_neighbors, len(embeddings))
        contexts = reference_contexts(neighbors[:, :k], similarity[:, :k] > -torch.inf)
        lookup = [contexts.contexts.T, sparse.eye_array(len(embeddings), dtype=np.float32)]
        lookup = sparse.vstack(lookup, format="csr")
        return cls(embeddings, k, neighbors, similarity, contexts, lookup, faiss_index)

    def to(self, device: torch.device) -> "ReferenceIndex":
        """The same with tensors on a device. Contexts stay on the CPU."""
        names = ("embeddings", "neighbors", "similarity")
        return self._replace(**{name: getattr(self, name).to(device) for name in names})


@full_precision
def build_reference_index(
    references: Tensor,
    *,
    num_neighbors: int = 20,
    num_candidates: int = 0,
    faiss_index: Any = None,
) -> ReferenceIndex:
    """Find each reference's neighbors among the references, and compute its context.

    Args:
        references: (R, D), any scale.
        num_neighbors: k >= 1, including the reference itself; clamped to R.
        num_candidates: how many nearest references to store for each reference, if more than k.
            :func:`contextual_rerank` does not search them again if references are the queries.
        faiss_index: a faiss index or its description, as in
            :class:`pml_extras.inference.ContextualKNN`. Default: exact search.

    Example:
        >>> import torch
        >>> references = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
        >>> build_reference_index(references, num_neighbors=2).neighbors
        tensor([[0, 1],
                [1, 0],
                [2, 3],
                [3, 2]])
    """
    normalized = normalize(references.detach())
    num_references = len(normalized)
    k = min(num_neighbors, num_references)
    faiss_index = build_faiss_index(faiss_index, normalized)
    num_found = max(k, min(num_candidates, num_references))
    found = knn_search(normalized, normalized, num_found, faiss_index)
    self_index = torch.arange(num_references, device=normalized.device)[:, None]
    similarity, neighbors = move_to_front(self_index, *found)
    return ReferenceIndex.from_neighbors(normalized, k, neighbors, similarity, faiss_index)


@full_precision
def contextual_rerank(
    query: Tensor,
    index: ReferenceIndex,
    k: int,
    *,
    keep_nearest: bool = True,
    query_indices: Tensor | None = None,
    exclude: Exclude | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Each query's nearest references by the similarity of their contexts.

    .. math:: d_{qr} = 1 - S_{qr}, \qquad S = \operatorname{rownorm}(E E A)\,
        \operatorname{rownorm}(E E A)^\top

    The context of a sample is a sparse row of weights, one per reference: A holds its k-reciprocal
    neighbors, and E averages over its k / 3 nearest neighbors (local query expansion). S is the
    cosine similarity of two contexts. References with equal contexts, or with no context in common
    with the query, are in the order of the embeddings' cosine similarity.

    Args:
        query: (Q, D), any scale.
        index: the references.
        k: how many neighbors to return; clamped to R.
        keep_nearest: whether the nearest reference by cosine similarity stays first, with the
            distance of the second if that is smaller. Then precision@1 does not change.
        query_indices: (Q,) int64, the indices of the queries among the references, if they are
            references.
        exclude: (Q, R) bool, the references that are neither neighbors nor results of a query; or a
            function from a slice of the queries to their rows. A query never excludes itself.

    Returns:
        (Q, k) distances in [0, 1], ascending, and (Q, k) int64 indices of references. A query that
        is a reference is its own first result. If fewer than k references are left, the last
        distances are inf and their indices -1.

    Source: ours. It combines k-reciprocal neighbors and local query expansion (Zhong et al. 2017,
    arXiv 1701.08398) in sparse products.

    Example:
        >>> import torch
        >>> references = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
        >>> index = build_reference_index(references, num_neighbors=2)
        >>> contextual_rerank(torch.tensor([[1.0, 0.3]]), index, k=2)[1]
        tensor([[1, 0]])
    """
    num_queries, num_references = len(query), len(index.embeddings)
    k = min(k, num_references)
    normalized = normalize(query.detach()).to(index.embeddings.dtype)
    similarity, candidates = _nearest(normalized, index, k, query_indices, exclude)
    contexts = _query_contexts(index, similarity, candidates, query_indices, exclude)

    # One sparse product adds both terms: [(1 - w) V_q, w cos_q] [V, I]^T. The cosine term has
    # entries for the candidates only, which are at least k, so that there are k results.
    cosine = TIE_WEIGHT * (1 + similarity).clamp_min(1e-3) / 2
    cosine = cosine.masked_fill(similarity == -torch.inf, 0)
    left = [(1 - TIE_WEIGHT) * contexts, from_lists(candidates, cosine, num_references)]
    left = sparse.hstack(left, format="csr")

    def scores_of(rows: slice) -> CSR:
        scores = left[rows] @ index.lookup
        if exclude is None:
            return scores
        excluded = excluded_rows(exclude, rows, query_indices, num_queries, num_references)
        return mask_entries_(excluded.cpu().numpy(), scores)

    scores, indices = sorted_entries(num_queries, scores_of, k)
    if keep_nearest:
        position = 0 if query_indices is None else min(1, candidates.shape[1] - 1)
        is_found = similarity[:, position] > -torch.inf
        nearest = torch.where(is_found, candidates[:, position], -1)
        scores, indices = move_to_front(nearest[:, None].cpu(), scores, indices)
    if query_indices is not None:
        scores, indices = move_to_front(query_indices[:, None].cpu(), scores, indices)
    distances = (1 - scores).clamp(0, 1).masked_fill(indices < 0, torch.inf)
    return distances.to(similarity), indices.to(query.device)


def _nearest(
    normalized: Tensor,
    index: ReferenceIndex,
    k: int,
    query_indices: Tensor | None,
    exclude: Exclude | None,
) -> tuple[Tensor, Tensor]:
    """The nearest references of the queries by cosine similarity, at least k of each."""
    num_found = max(k, index.num_neighbors)
    if exclude is not None:
        found = knn_search_without(normalized, index.embeddings, num_found, exclude, query_indices)
    elif query_indices is not None and index.neighbors.shape[1] >= num_found:
        rows = query_indices, slice(num_found)
        return index.similarity[rows], index.neighbors[rows]
    else:
        found = knn_search(normalized, index.embeddings, num_found, index.faiss_index)
    return found if query_indices is None else move_to_front(query_indices[:, None], *found)


def _query_contexts(
    index: ReferenceIndex,
    similarity: Tensor,
    candidates: Tensor,
    query_indices: Tensor | None,
    exclude: Exclude | None,
) -> CSR:
    """The contexts of the queries, (Q, R)."""
    if query_indices is not None and exclude is None:
        return index.contexts.contexts[query_indices.cpu().numpy()]
    k = index.num_neighbors
    radius = index.similarity[:, k - 1]  # of the neighborhoods of the references
    neighbors, is_neighbor = candidates[:, :k], similarity[:, :k] > -torch.inf
    is_reciprocal = is_neighbor & (similarity[:, :k] >= radius[neighbors])
    return query_contexts(index.contexts, neighbors, is_neighbor, is_reciprocal)
