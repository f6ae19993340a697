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
from ..functional._reranking import Exclude


class ContextualKNN(HyperparametersMixin):
    r"""Finds nearest neighbors by contextual similarity and cosine distance.

    A ``knn_func`` for PML's ``AccuracyCalculator``, testers and ``InferenceModel``. Each query's
    nearest references are re-ranked by

    .. math:: d_{qr} = (1 - w)\,(1 - S_{qr}) + w\,\tfrac12(1 - \cos_{qr})

    with the contextual similarity S, the overlap of the neighborhoods of query and reference. See
    :func:`pml_extras.functional.contextual_rerank`. In addition to the nearest-neighbor search,
    time and memory grow with queries x candidates. The search uses faiss if it is installed.

    Args:
        num_neighbors: k >= 1 of the contextual similarity, including the sample itself. A good
            value is the number of samples per class, or less. Clamped to the number of references.
        num_candidates: how many of the nearest references to re-rank, if more than the number of
            neighbors that are asked for.
        distance_weight: w in [0, 1]. With 1, only the cosine distance counts.

    Raises:
        ValueError: for a hyperparameter out of range, a call without references, or rows that are
            not finite.

    Source: ours, as an alternative to k-reciprocal re-ranking (Zhong et al. 2017, arXiv
    1701.08398), based on the contextual similarity of arXiv 2210.01908.

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
        self, *, num_neighbors: int = 20, num_candidates: int = 100, distance_weight: float = 0.3
    ) -> None:
        num_neighbors = _checks.count("num_neighbors", num_neighbors)
        num_candidates = _checks.count("num_candidates", num_candidates)
        _checks.in_range(0, 1, distance_weight=distance_weight)
        self.num_neighbors = num_neighbors
        self.num_candidates = num_candidates
        self.distance_weight = distance_weight
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
                or a function from a slice of the queries to their rows. In re-identification, the
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
            num_candidates = max(k, self.num_candidates) if are_queries else 0
            index = build_reference_index(
                reference, num_neighbors=self.num_neighbors, num_candidates=num_candidates
            )
        elif self.index is not None:
            index = self.index = ReferenceIndex(*(x.to(query.device) for x in self.index))
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
            num_candidates=self.num_candidates,
            distance_weight=self.distance_weight,
            query_indices=query_index if ref_includes_query else None,
            exclude=exclude,
        )
        return return_results(distances, indices, ref_includes_query)

    def train(self, embeddings: Tensor) -> None:
        """Replace the references by these, (R, D)."""
        embeddings = _as_tensor(embeddings)
        _check_references(embeddings, "embeddings")
        self.index = build_reference_index(embeddings, num_neighbors=self.num_neighbors)

    def add(self, embeddings: Tensor) -> None:
        """Add these references, (R, D)."""
        embeddings = _as_tensor(embeddings)
        known = [] if self.index is None else [self.index.embeddings.to(embeddings.device)]
        self.train(torch.cat([*known, embeddings]))

    def save(self, filename: str | Path) -> None:
        """Save the references and their index to a file."""
        if self.index is None:
            raise ValueError("there are no references to save")
        torch.save({"num_neighbors": self.num_neighbors, **self.index._asdict()}, filename)

    def load(self, filename: str | Path) -> None:
        """Load what :meth:`save` saved: the references, their index, and its ``num_neighbors``.

        It moves to the device of the queries.
        """
        saved = torch.load(filename, map_location="cpu", weights_only=True)
        self.num_neighbors = saved.pop("num_neighbors")
        self.index = ReferenceIndex(**saved)

    def reset(self) -> None:
        """Remove the references."""
        self.index = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"


def _as_tensor(embeddings: Any) -> Tensor:
    return torch.from_numpy(embeddings) if isinstance(embeddings, np.ndarray) else embeddings


def _check_references(references: Tensor, name: str) -> None:
    _checks.embeddings(references, name=name, finite=True)
    _checks.require(len(references) > 0, name, "have at least one row", tuple(references.shape))
