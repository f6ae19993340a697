"""Re-ranking of nearest neighbors by contextual similarity, without a queries x references matrix.

The contextual similarity is computed on neighbor lists: each neighborhood is a list of exactly k
references, where a mask would include all ties.
"""

import importlib.util
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ._kernels.chunks import row_chunks
from ._kernels.precision import full_precision
from ._neighborhoods import neighborhood_overlap

CHUNK_NUMEL = 1 << 22  # numbers held per chunk of queries, in addition to the results


Exclude: TypeAlias = Tensor | Callable[[slice], Tensor]


class ReferenceIndex(NamedTuple):
    """What re-ranking needs to know about R references with k neighbors each."""

    embeddings: Tensor
    """(R, D), normalized."""
    neighbor_weights: Tensor
    """(R, k) in [0, 1], the overlap of each neighbor's neighborhood with the reference's."""
    is_reciprocal_half: Tensor
    """(R, h) bool, which of the first h = max(k // 2, 1) neighbors have the reference among their
    first h."""
    candidates: Tensor
    """(R, c >= k) int64, the nearest references by cosine similarity, the reference itself first.
    The first k are its neighbors; more are for references that become queries."""
    candidate_similarity: Tensor
    """(R, c), the cosine similarity of the candidates."""

    @property
    def neighbors(self) -> Tensor:
        return self.candidates[:, : self.neighbor_weights.shape[1]]


def knn_search(query: Tensor, references: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest dot products of each query with the references, and their indices.

    Uses faiss if it is installed and the tensors are float32 on the CPU, torch otherwise.
    """
    has_faiss = importlib.util.find_spec("faiss") is not None
    if has_faiss and query.device.type == "cpu" and query.dtype == torch.float32:
        import faiss  # only here, to keep the package's import light

        index = faiss.IndexFlatIP(references.shape[1])
        index.add(references.contiguous().numpy())
        similarity, indices = index.search(query.contiguous().numpy(), k)
        return torch.from_numpy(similarity), torch.from_numpy(indices)
    found = [
        (query[rows] @ references.T).topk(k, dim=1)
        for rows in row_chunks(len(query), len(references), CHUNK_NUMEL)
    ]
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])


@full_precision
def build_reference_index(
    references: Tensor, *, num_neighbors: int, num_candidates: int = 0
) -> ReferenceIndex:
    """Find each reference's neighbors among the references and compare their neighborhoods.

    Args:
        references: (R, D), any scale.
        num_neighbors: k >= 1, including the reference itself; clamped to R.
        num_candidates: how many nearest references to store for each reference, if more than k.
            :func:`contextual_rerank` does not search them again if references are the queries.

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
    half = max(k // 2, 1)
    self_index = torch.arange(num_references, device=normalized.device)[:, None]
    found = knn_search(normalized, normalized, max(k, min(num_candidates, num_references)))
    candidate_similarity, candidates = _self_first(self_index, *found)
    neighbors = candidates[:, :k]

    neighbor_weights = torch.empty_like(candidate_similarity[:, :k])
    size, ones = normalized.new_full((), k), torch.ones_like(neighbor_weights)
    for rows in row_chunks(num_references, num_references + k * k, CHUNK_NUMEL):
        # (B, k): how many of a reference's neighbors are among the neighbors of each of these
        num_shared = _scatter_gather(
            neighbors[rows], ones[rows], neighbors[neighbors[rows]], num_references
        ).sum(2)
        neighbor_weights[rows] = neighborhood_overlap(num_shared, size, size, num_references)
    half_neighbors = neighbors[:, :half]
    is_reciprocal_half = (neighbors[half_neighbors, :half] == self_index[:, :, None]).any(2)
    return ReferenceIndex(
        normalized, neighbor_weights, is_reciprocal_half, candidates, candidate_similarity
    )


@full_precision
def contextual_rerank(
    query: Tensor,
    index: ReferenceIndex,
    k: int,
    *,
    num_candidates: int = 100,
    distance_weight: float = 0.3,
    query_indices: Tensor | None = None,
    exclude: Exclude | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Each query's nearest references, by a mix of contextual similarity and cosine distance.

    .. math:: d_{qr} = (1 - w)\,(1 - S_{qr}) + w\,\tfrac12(1 - \cos_{qr})

    S is the :func:`contextual_similarity` (without slack) of queries and references, computed for
    each query's nearest candidates only.

    Args:
        query: (Q, D), any scale.
        index: the references.
        k: how many neighbors to return; clamped to R.
        num_candidates: how many of the nearest references by cosine similarity to re-rank, if more
            than k. The context of farther references counts as 0.
        distance_weight: w in [0, 1]. With 1, only the cosine distance counts.
        query_indices: (Q,) int64, the indices of the queries among the references, if they are
            references.
        exclude: (Q, R) bool, the references that are neither neighbors nor results of a query; or a
            function from a slice of the queries to their rows. A query never excludes itself.

    Returns:
        (Q, k) distances in [0, 1], ascending, and (Q, k) int64 indices of references. A query that
        is a reference is among its own results, usually first. If fewer than k references are left,
        the last distances are inf and their indices -1.

    Source: ours, as an alternative to k-reciprocal re-ranking (Zhong et al. 2017, arXiv
    1701.08398).

    Example:
        >>> import torch
        >>> references = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
        >>> index = build_reference_index(references, num_neighbors=2)
        >>> contextual_rerank(torch.tensor([[1.0, 0.3]]), index, k=2)[1]
        tensor([[1, 0]])
    """
    num_references, num_neighbors = index.neighbors.shape
    half = index.is_reciprocal_half.shape[1]
    k = min(k, num_references)
    normalized = normalize(query.detach()).to(index.embeddings.dtype)
    c = min(max(k, num_candidates, num_neighbors), num_references)
    if exclude is not None and len(query) > 0:
        found = _search_allowed(normalized, index.embeddings, c, exclude, query_indices)
        similarity, candidates = found
    elif query_indices is not None and index.candidates.shape[1] >= c:
        similarity = index.candidate_similarity[query_indices, :c]
        candidates = index.candidates[query_indices, :c]
    else:
        similarity, candidates = knn_search(normalized, index.embeddings, c)
        if query_indices is not None:
            similarity, candidates = _self_first(query_indices[:, None], similarity, candidates)
    threshold = index.candidate_similarity[:, num_neighbors - 1]  # (R,)
    half_threshold = index.candidate_similarity[:, half - 1]
    size = normalized.new_full((), num_neighbors)

    distances = torch.empty_like(similarity)
    for rows in row_chunks(len(query), num_references + c * num_neighbors, CHUNK_NUMEL):
        candidate, cosine = candidates[rows], similarity[rows]  # (B, c)
        ref_neighbors = index.neighbors[candidate]  # (B, c, k)
        is_allowed = (cosine > -torch.inf).to(cosine.dtype)  # 0 pads the rows of few candidates
        if query_indices is None or exclude is not None:
            query_neighbors = candidate[:, :num_neighbors]
            is_reciprocal_half = cosine[:, :half] >= half_threshold[candidate[:, :half]]
            in_ref_knn = cosine >= threshold[candidate]
        else:
            self_index = query_indices[rows]
            query_neighbors = index.neighbors[self_index]
            is_reciprocal_half = index.is_reciprocal_half[self_index]
            in_ref_knn = (ref_neighbors == self_index[:, None, None]).any(2)

        # J_qr, for each candidate: the mean of W over the reciprocal neighbors among the query's
        # first k // 2 (local query expansion)
        expansion = query_neighbors[:, :half]
        expansion_weights = is_reciprocal_half.to(cosine.dtype)
        expansion_weights /= expansion_weights.sum(1, keepdim=True).clamp_min(1)
        expanded_weights = expansion_weights[:, :, None] * index.neighbor_weights[expansion]
        query_to_ref = _scatter_gather(
            index.neighbors[expansion], expanded_weights, candidate, num_references
        )
        # J_rq: the same from each candidate to the query
        num_shared = _scatter_gather(
            query_neighbors, is_allowed[:, :num_neighbors], ref_neighbors, num_references
        ).sum(2)
        query_weights = neighborhood_overlap(num_shared, size, size, num_references) * in_ref_knn
        ref_reciprocal = index.is_reciprocal_half[candidate].to(cosine.dtype)  # (B, c, h)
        ref_weights = _scatter_gather(
            candidate, query_weights, ref_neighbors[:, :, :half], num_references
        )
        ref_to_query = (ref_reciprocal * ref_weights).sum(2)
        ref_to_query /= ref_reciprocal.sum(2).clamp_min(1)

        context = (query_to_ref + ref_to_query) / 2
        mixed = (1 - distance_weight) * (1 - context) + distance_weight * (1 - cosine) / 2
        distances[rows] = mixed.masked_fill(is_allowed == 0, torch.inf)
    distances, order = distances.sort(dim=1, stable=True)
    indices = candidates.gather(1, order).masked_fill(distances == torch.inf, -1)
    return distances[:, :k], indices[:, :k]


def _search_allowed(
    query: Tensor,
    references: Tensor,
    k: int,
    exclude: Exclude,
    query_indices: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As :func:`knn_search`, without the excluded references, whose similarity is -inf."""
    if isinstance(exclude, Tensor) and len(exclude) != len(query):
        raise ValueError(f"exclude must have {len(query)} rows, one per query, got {len(exclude)}")
    found = []
    for rows in row_chunks(len(query), len(references), CHUNK_NUMEL):
        excluded = exclude[rows] if isinstance(exclude, Tensor) else exclude(rows)
        if excluded.shape != (len(query[rows]), len(references)) or excluded.dtype != torch.bool:
            raise ValueError(
                f"exclude must be bool of shape ({len(query[rows])}, {len(references)}), got"
                f" {excluded.dtype} of shape {tuple(excluded.shape)}"
            )
        similarity = query[rows] @ references.T
        if query_indices is not None:
            self_index = query_indices[rows, None]
            similarity.scatter_(1, self_index, 2)  # above any cosine
            excluded = excluded.scatter(1, self_index, False)
        similarity.masked_fill_(excluded, -torch.inf)
        found.append(similarity.topk(k, dim=1))
    similarity = torch.cat([f.values for f in found]).clamp_max(1)
    return similarity, torch.cat([f.indices for f in found])


def _self_first(self_index: Tensor, similarity: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Move each row's own index, (Q, 1), to the front of its neighbor list, (Q, c).

    Rounding and duplicates can put others before it, or push it out of the list.
    """
    is_self = indices == self_index
    is_self[:, -1] |= ~is_self.any(1)  # it replaces the last one
    order = is_self.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    similarity, indices = similarity.gather(1, order), indices.gather(1, order)
    indices[:, :1] = self_index
    similarity[:, 0] = similarity.amax(1)
    return similarity, indices


def _scatter_gather(index: Tensor, values: Tensor, wanted: Tensor, num_references: int) -> Tensor:
    """Sum each row's ``values`` by ``index``, both (B, ...), and read the sums at ``wanted``."""
    sums = values.new_zeros(len(index), num_references)
    sums.scatter_add_(1, index.flatten(1), values.flatten(1))
    return sums.gather(1, wanted.flatten(1)).view(wanted.shape)
