"""Nearest-neighbor search by cosine similarity, with faiss if it is installed."""

import importlib.util
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ._kernels.chunks import row_chunks

CHUNK_NUMEL = 1 << 22  # similarities computed at a time

Exclude: TypeAlias = Tensor | Callable[[slice], Tensor]
"""(Q, R) bool, or a function from a slice of the queries to their rows of it."""


def knn_search(
    query: Tensor, references: Tensor, k: int, faiss_index: Any = None
) -> tuple[Tensor, Tensor]:
    """The k most similar references of each query: similarities, descending, and indices, (Q, k).

    Args:
        query: (Q, D), normalized.
        references: (R, D), normalized.
        k: at most R.
        faiss_index: a faiss index that contains the references. It may be approximate: where it
            finds fewer than k, the last similarities are -inf and their indices 0. Default: exact
            search, by faiss if it is installed and the tensors are float32 on the CPU.
    """
    has_faiss = importlib.util.find_spec("faiss") is not None
    is_float_on_cpu = query.device.type == "cpu" and query.dtype == torch.float32
    if faiss_index is None and has_faiss and is_float_on_cpu:
        faiss_index = build_faiss_index("Flat", references)
    if faiss_index is not None:
        found = faiss_index.search(query.float().cpu().contiguous().numpy(), k)
        similarity, indices = (torch.from_numpy(x) for x in found)
        if faiss_index.metric_type != 0:  # squared Euclidean distances of normalized vectors
            similarity = 1 - similarity / 2
        similarity = similarity.masked_fill(indices < 0, -torch.inf).to(query)
        return similarity, indices.clamp_min(0).to(query.device)
    chunks = [
        (query[rows] @ references.T).topk(k, dim=1)
        for rows in row_chunks(len(query), len(references), CHUNK_NUMEL)
    ]
    return torch.cat([c.values for c in chunks]), torch.cat([c.indices for c in chunks])


def build_faiss_index(index: Any, references: Tensor) -> Any:
    """A faiss index that contains the normalized references, (R, D).

    Args:
        index: a description for ``faiss.index_factory``, or an index. An empty index is copied,
            trained if necessary and filled; one that is not empty must hold the R references.
            None stands for exact search without an index, and is returned.
    """
    if index is None:
        return None
    import faiss  # only here, to keep the package's import light

    vectors = references.float().cpu().contiguous().numpy()
    if isinstance(index, str):
        index = faiss.index_factory(references.shape[1], index, faiss.METRIC_INNER_PRODUCT)
    elif index.ntotal == 0:
        index = faiss.clone_index(index)
    if index.d != references.shape[1] or index.ntotal not in (0, len(references)):
        raise ValueError(
            f"the index must hold no vectors or {len(references)}, of {references.shape[1]} values,"
            f" got {index.ntotal} of {index.d} values"
        )
    if index.ntotal == 0:
        if not index.is_trained:
            index.train(vectors)
        index.add(vectors)
    return index


def knn_search_without(
    query: Tensor,
    references: Tensor,
    k: int,
    exclude: Exclude,
    query_indices: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As :func:`knn_search`, exactly and without the excluded references.

    A query among the references, at ``query_indices``, is always found. Where fewer than k
    references are left, the last similarities are -inf.
    """
    found = []
    for rows in row_chunks(len(query), len(references), CHUNK_NUMEL):
        excluded = excluded_rows(exclude, rows, query_indices, len(query), len(references))
        similarity = (query[rows] @ references.T).masked_fill_(excluded, -torch.inf)
        found.append(similarity.topk(k, dim=1))
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])


def excluded_rows(
    exclude: Exclude,
    rows: slice,
    query_indices: Tensor | None,
    num_queries: int,
    num_references: int,
) -> Tensor:
    """The rows of ``exclude`` for a slice of the queries, without the queries themselves."""
    if isinstance(exclude, Tensor) and len(exclude) != num_queries:
        raise ValueError(f"exclude must have {num_queries} rows, one per query, got {len(exclude)}")
    excluded = exclude[rows] if isinstance(exclude, Tensor) else exclude(rows)
    expected = len(range(num_queries)[rows]), num_references
    if excluded.shape != expected or excluded.dtype != torch.bool:
        raise ValueError(
            f"exclude must be bool of shape {expected}, got {excluded.dtype} of shape"
            f" {tuple(excluded.shape)}"
        )
    if query_indices is not None:
        excluded = excluded.scatter(1, query_indices[rows, None], False)
    return excluded


def move_to_front(wanted: Tensor, similarity: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Move each row's wanted index, (Q, 1), to the front of its neighbor list, (Q, c).

    It gets the largest similarity of its row. If it is not in the list, it replaces the last index.
    """
    is_wanted = indices == wanted
    is_wanted[:, -1] |= ~is_wanted.any(1)
    order = is_wanted.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    similarity, indices = similarity.gather(1, order), indices.gather(1, order)
    indices[:, :1] = wanted
    similarity[:, 0] = similarity.amax(1)
    return similarity, indices
