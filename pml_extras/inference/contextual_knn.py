"""Re-ranking at test time, as a replacement for PML's FaissKNN."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_metric_learning.utils.inference import return_results
from torch import Tensor

from .. import _checks
from .._component import HyperparametersMixin
from ..functional import ReferenceIndex, build_reference_index, contextual_rerank
from ..functional._knn_search import Exclude, build_faiss_index


class ContextualKNN(HyperparametersMixin):
    """Finds nearest neighbors by the similarity of their contexts.

    A ``knn_func`` for PML's ``AccuracyCalculator``, testers and ``InferenceModel``. The context of
    a sample is its k-reciprocal neighborhood, averaged over its nearest neighbors; see
    :func:`pml_extras.functional.contextual_rerank`. No matrix of queries and references is made:
    time and memory grow linearly with their numbers, apart from the nearest-neighbor search.

    Args:
        num_neighbors: k >= 1, including the sample itself. Best is about the number of samples per
            class, for classes of up to 20; for larger classes, 20 to 30. Clamped to the number of
            references.
        keep_nearest: whether the nearest reference by cosine similarity stays first. Then
            precision@1 does not change. Otherwise it falls on some data, by up to 7 points.
        faiss_index: how to search. Default: exactly, with faiss if it is installed. With many
            references, pass a description for ``faiss.index_factory`` such as ``"HNSW32"``, or a
            faiss index: an empty one, which is copied and filled, or one that holds the references.

    Raises:
        ValueError: for a hyperparameter out of range, a call without references, rows that are
            not finite, or an index that holds other references.

    Source: ours. It combines k-reciprocal neighbors and local query expansion (Zhong et al. 2017,
    arXiv 1701.08398) in sparse products.

    Example:
        >>> import torch
        >>> from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
        >>> from pml_extras.inference import ContextualKNN
        >>> calculator = AccuracyCalculator(
        ...     include=("mean_average_precision_at_r",),
        ...     k="max_bin_count",
        ...     knn_func=ContextualKNN(),
        ... )
        >>> embeddings, labels = torch.randn(40, 8), torch.arange(40) % 4
        >>> accuracy = calculator.get_accuracy(embeddings, labels)
    """

    def __init__(
        self,
        *,
        num_neighbors: int = 20,
        keep_nearest: bool = True,
        faiss_index: Any = None,
    ) -> None:
        self.num_neighbors = _checks.count("num_neighbors", num_neighbors)
        self.keep_nearest = keep_nearest
        self.faiss_index = faiss_index
        self.index: ReferenceIndex | None = None

    def __call__(
        self,
        query: Tensor,
        k: int,
        reference: Tensor | None = None,
        ref_includes_query: bool = False,
        *,
        exclude: Exclude | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Each query's k nearest references. Embeddings may also be NumPy arrays.

        Args:
            query: (Q, D).
            k: clamped to the number of references, less one with ``ref_includes_query``.
            reference: (R, D). Default: the references of :meth:`train`.
            ref_includes_query: whether the first Q references are the queries. Then a query is not
                among its own neighbors.
            exclude: (Q, R) bool, the references that are neither neighbors nor results of a query;
                or a function from a slice of the queries to their rows, which is called twice for
                each row and from several threads. In re-identification, the
                images of the same person by the same camera:
                ``(ids[:, None] == ref_ids) & (cameras[:, None] == ref_cameras)``.

        Returns:
            (Q, k) distances in [0, 1], ascending, and (Q, k) int64 indices of references. If fewer
            than k references are left, the last distances are inf and their indices -1.
        """
        query = _as_tensor(query)
        reference = None if reference is None else _as_tensor(reference)
        exclude = exclude if callable(exclude) else _as_tensor(exclude)
        k = _checks.count("k", k) + ref_includes_query
        if reference is not None:
            _check_references(reference, "reference")
            are_queries = ref_includes_query and len(query) == len(reference)
            index = self._build_index(reference, num_candidates=k if are_queries else 0)
        elif self.index is not None:
            index = self.index = self.index.to(query.device)
        else:
            raise ValueError("there are no references: pass some, or call train first")
        _checks.embeddings(query, index.embeddings.shape[1], "query", finite=True)
        if ref_includes_query and len(query) > len(index.embeddings):
            raise ValueError(
                f"with ref_includes_query, the first {len(query)} references must be the queries,"
                f" and there are {len(index.embeddings)}"
            )
        query_index = torch.arange(len(query), device=query.device)
        distances, indices = contextual_rerank(
            query,
            index,
            k,
            keep_nearest=self.keep_nearest,
            query_indices=query_index if ref_includes_query else None,
            exclude=exclude,
        )
        return return_results(distances, indices, ref_includes_query)

    def train(self, embeddings: Tensor) -> None:
        """Replace the references by these, (R, D)."""
        embeddings = _as_tensor(embeddings)
        _check_references(embeddings, "embeddings")
        self.index = self._build_index(embeddings)

    def add(self, embeddings: Tensor) -> None:
        """Add these references, (R, D)."""
        embeddings = _as_tensor(embeddings)
        known = [] if self.index is None else [self.index.embeddings.to(embeddings.device)]
        self.train(torch.cat([*known, embeddings]))

    def save(self, filename: str | Path) -> None:
        """Save the references and their index to a file."""
        if self.index is None:
            raise ValueError("there are no references to save")
        names = ("embeddings", "neighbors", "similarity")
        tensors = {name: getattr(self.index, name) for name in names}
        torch.save({"num_neighbors": self.num_neighbors, **tensors}, filename)

    def load(self, filename: str | Path) -> None:
        """Load what :meth:`save` saved: the references, their index, and its ``num_neighbors``.

        It moves to the device of the queries.
        """
        saved = torch.load(filename, map_location="cpu", weights_only=True)
        self.num_neighbors = saved["num_neighbors"]
        faiss_index = build_faiss_index(self.faiss_index, saved["embeddings"])
        self.index = ReferenceIndex.from_neighbors(**saved, faiss_index=faiss_index)

    def reset(self) -> None:
        """Remove the references."""
        self.index = None

    def _build_index(self, references: Tensor, num_candidates: int = 0) -> ReferenceIndex:
        return build_reference_index(
            references,
            num_neighbors=self.num_neighbors,
            num_candidates=num_candidates,
            faiss_index=self.faiss_index,
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"


def _as_tensor(embeddings: Any) -> Tensor:
    return torch.from_numpy(embeddings) if isinstance(embeddings, np.ndarray) else embeddings


def _check_references(references: Tensor, name: str) -> None:
    _checks.embeddings(references, name=name, finite=True)
    _checks.require(len(references) > 0, name, "have at least one row", tuple(references.shape))
