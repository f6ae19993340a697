"""Nearest neighbours re-ordered by context, without a queries x references matrix."""

from __future__ import annotations

import importlib.util
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ._parts import parts
from ._precision import full_precision
from .contextual_similarity import agreement

# How many numbers a block of queries may take at a time, besides its results.
BLOCK = 1 << 22


class ReferenceIndex(NamedTuple):
    """What re-ranking needs to know of R references, k neighbours each."""

    embeddings: Tensor
    """(R, D), normalised."""
    neighbors: Tensor
    """(R, k) int64, the nearest references by cosine similarity, the reference itself first."""
    similarity: Tensor
    """(R, k), in the same order."""
    opinion: Tensor
    """(R, k), how far each of those neighbours shares the reference's neighbourhood, in [0, 1]."""
    reciprocal: Tensor
    """(R, h) bool, which of the first h = max(k // 2, 1) have the reference among their first h."""
    candidates: Tensor
    """(R, c >= k), as neighbors, and what comes next, for references that will be queries too."""
    candidate_similarity: Tensor
    """(R, c)."""


def nearest(query: Tensor, references: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest dot products of each query with the references, and whose they are.

    Searched by faiss where it is installed and the tensors are on the CPU, by torch otherwise.
    """
    if (
        importlib.util.find_spec("faiss")
        and query.device.type == "cpu"
        and query.dtype == torch.float32
    ):
        import faiss  # here, to stay light for those who search nothing

        index = faiss.IndexFlatIP(references.shape[1])
        index.add(references.contiguous().numpy())
        similarity, indices = index.search(query.contiguous().numpy(), k)
        return torch.from_numpy(similarity), torch.from_numpy(indices)
    found = [
        (query[rows] @ references.T).topk(k, dim=1)
        for rows in parts(len(query), len(references), BLOCK)
    ]
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])


@full_precision
def build_reference_index(
    references: Tensor, num_neighbors: int, num_candidates: int = 0
) -> ReferenceIndex:
    """Find each reference's neighbours among the references and compare their neighbourhoods.

    Args:
        references: (R, D), any scale.
        num_neighbors: k >= 1, the reference itself included; clamped to R.
        num_candidates: how many of its nearest to remember for each reference, if more than k: what
            :func:`contextual_rerank` need not search again where references are the queries.

    Example:
        >>> import torch
        >>> references = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
        >>> build_reference_index(references, num_neighbors=2).neighbors
        tensor([[0, 1],
                [1, 0],
                [2, 3],
                [3, 2]])
    """
    unit = normalize(references.detach())
    k = min(num_neighbors, len(unit))
    half = max(k // 2, 1)
    found = nearest(unit, unit, max(k, min(num_candidates, len(unit))))
    itself = torch.arange(len(unit), device=unit.device)[:, None]
    candidate_similarity, candidates = _put_first(itself, *found)
    similarity, neighbors = candidate_similarity[:, :k], candidates[:, :k]

    size = unit.new_full((), k)
    opinion = torch.empty_like(similarity)
    blocks = parts(len(unit), len(unit) + k * k, BLOCK)
    table = unit.new_zeros(blocks[0].stop if blocks else 0, len(unit))
    for rows in blocks:
        shared = _count_shared(table, neighbors[rows], neighbors[neighbors[rows]])
        opinion[rows] = agreement(shared, size, size, len(unit))
    first = neighbors[:, :half]
    reciprocal = (neighbors[first, :half] == itself[:, :, None]).any(2)
    return ReferenceIndex(
        unit, neighbors, similarity, opinion, reciprocal, candidates, candidate_similarity
    )


@full_precision
def contextual_rerank(
    query: Tensor,
    graph: ReferenceIndex,
    k: int,
    num_candidates: int = 100,
    distance_weight: float = 0.3,
    query_indices: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Each query's nearest references, by a mix of contextual similarity and cosine distance.

    .. math:: d_{qr} = (1 - w)\,(1 - S_{qr}) + w\,\tfrac12(1 - \cos_{qr})

    with S the :func:`contextual_similarity_from_distances` (slack 0) of queries and references,
    worked out for each query's nearest candidates alone. Neighbourhoods are lists of exactly k
    references here: of equally distant ones at the end of a list, some are left out.

    Args:
        query: (Q, D), any scale.
        graph: the references.
        k: how many neighbours to return; clamped to R.
        num_candidates: how many of the nearest references by cosine similarity to order anew, if
            more than k. What lies beyond them counts as having no context in common.
        distance_weight: w in [0, 1]. With 1, the order is by distance alone.
        query_indices: (Q,) int64, where the queries are among the references, if they are.

    Returns:
        (Q, k) distances in [0, 1], ascending, and (Q, k) int64 indices of references. A query that
        is a reference finds itself.

    Source: ours, in the place of k-reciprocal re-ranking (Zhong et al. 2017, arXiv 1701.08398).

    Example:
        >>> import torch
        >>> references = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
        >>> graph = build_reference_index(references, num_neighbors=2)
        >>> contextual_rerank(torch.tensor([[1.0, 0.3]]), graph, k=2)[1]
        tensor([[1, 0]])
    """
    num_references, num_neighbors = graph.neighbors.shape
    half = graph.reciprocal.shape[1]
    k = min(k, num_references)
    unit = normalize(query.detach()).to(graph.embeddings.dtype)
    wanted = min(max(k, num_candidates, num_neighbors), num_references)
    if query_indices is not None and graph.candidates.shape[1] >= wanted:
        similarity = graph.candidate_similarity[query_indices, :wanted]
        candidates = graph.candidates[query_indices, :wanted]
    else:
        similarity, candidates = nearest(unit, graph.embeddings, wanted)
        if query_indices is not None:
            similarity, candidates = _put_first(query_indices[:, None], similarity, candidates)
    size = unit.new_full((), num_neighbors)
    radius, half_radius = graph.similarity[:, -1], graph.similarity[:, half - 1]

    distances = torch.empty_like(similarity)
    blocks = parts(len(query), num_references + candidates.shape[1] * num_neighbors, BLOCK)
    table = unit.new_zeros(blocks[0].stop if blocks else 0, num_references)
    for rows in blocks:
        nearby, cosine = candidates[rows], similarity[rows]
        theirs = graph.neighbors[nearby]
        near = nearby[:, :num_neighbors]
        if query_indices is None:
            trusts_back = cosine[:, :half] >= half_radius[nearby[:, :half]]
            knows_back = cosine >= radius[nearby]
        else:
            own = query_indices[rows]
            near = graph.neighbors[own]
            trusts_back = graph.reciprocal[own]
            knows_back = (theirs == own[:, None, None]).any(2)

        # What the query's closest reciprocal neighbours think of each reference.
        votes = trusts_back.to(cosine.dtype)
        votes = votes / votes.sum(1, keepdim=True).clamp_min(1)
        counsel = near[:, :half]
        advice = votes[:, :, None] * graph.opinion[counsel]
        forth = _sums(table, graph.neighbors[counsel], advice, nearby)
        # What each reference's closest reciprocal neighbours think of the query.
        shared = _count_shared(table, near, theirs)
        opinion = agreement(shared, size, size, num_references) * knows_back
        asked = graph.reciprocal[nearby].to(cosine.dtype)
        answers = _sums(table, nearby, opinion, theirs[:, :, :half])
        back = (asked * answers).sum(2) / asked.sum(2).clamp_min(1)

        context = (forth + back) / 2
        distances[rows] = (1 - distance_weight) * (1 - context) + distance_weight * (1 - cosine) / 2
    distances, order = distances.sort(dim=1, stable=True)
    return distances[:, :k], candidates.gather(1, order)[:, :k]


def _put_first(itself: Tensor, values: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Make each row's own index its first: rounding and duplicates can put others before it."""
    is_own = indices == itself
    place = torch.where(is_own.any(1), is_own.long().argmax(1), indices.shape[1] - 1)[:, None]
    column = torch.arange(indices.shape[1], device=indices.device)
    # Everything before the place moves back by one.
    source = torch.where(column == 0, place, torch.where(column <= place, column - 1, column))
    values, indices = values.gather(1, source), indices.gather(1, source)
    indices[:, :1] = itself
    values[:, 0] = torch.maximum(values[:, 0], values.amax(1))
    return values, indices


def _count_shared(table: Tensor, near: Tensor, theirs: Tensor) -> Tensor:
    """(B, L): how many of row b's k neighbours, (B, k), are among the k of l, (B, L, k)."""
    return _sums(table, near, table.new_ones(()).expand(near.shape), theirs).sum(2)


def _sums(table: Tensor, at: Tensor, values: Tensor, wanted: Tensor) -> Tensor:
    """Sum up row b's ``values`` by what they are ``at``, both (B, ...), and read the sums of those
    that are ``wanted``, (B, ...). ``table`` has a row for each of the B, or more, and a column for
    each sum; it holds zeros, and does again."""
    sums = table[: len(at)]
    at = at.flatten(1)
    sums.scatter_add_(1, at, values.flatten(1))
    found = sums.gather(1, wanted.flatten(1)).view(wanted.shape)
    sums.scatter_(1, at, 0)  # quicker than new zeros, where few of them are used
    return found
