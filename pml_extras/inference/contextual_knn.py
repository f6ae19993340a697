"""Re-ranking at test time, in the place of PML's FaissKNN."""

from __future__ import annotations

from pathlib import Path

import torch
from pytorch_metric_learning.utils.inference import return_results
from torch import Tensor

from .._component import check_count, check_embeddings, check_finite, require
from ..functional import ReferenceIndex, build_reference_index, contextual_rerank


class ContextualKNN:
    r"""Finds nearest neighbours by context as well as by cosine distance.

    A ``knn_func`` for PML's ``AccuracyCalculator``, testers and ``InferenceModel``. Each query's
    nearest references are put in the order of

    .. math:: d_{qr} = (1 - w)\,(1 - S_{qr}) + w\,\tfrac12(1 - \cos_{qr})

    with S the contextual similarity: how far query and reference share neighbours. See
    :func:`pml_extras.functional.contextual_rerank`. Time and memory grow with queries x
    candidates, beside the search itself; faiss is used where it is installed.

    Args:
        num_neighbors: k >= 1 of the contextual similarity, the sample itself included; about as
            many as a class has samples, or fewer. Clamped to the number of references.
        num_candidates: how many of the nearest references to order anew, if more than are asked
            for.
        distance_weight: w in [0, 1]. With 1, the order is by distance alone.

    Raises:
        ValueError: for a setting out of range, a call without references, or rows that are not
            finite.

    Source: ours, in the place of k-reciprocal re-ranking (Zhong et al. 2017, arXiv 1701.08398), on
    the contextual similarity of arXiv 2210.01908.

    Example:
        >>> from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
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
        num_candidates: int = 100,
        distance_weight: float = 0.3,
    ) -> None:
        check_count("num_neighbors", num_neighbors)
        check_count("num_candidates", num_candidates)
        require(0 <= distance_weight <= 1, "distance_weight", "lie in [0, 1]", distance_weight)
        self.num_neighbors = num_neighbors
        self.num_candidates = num_candidates
        self.distance_weight = distance_weight
        self.graph: ReferenceIndex | None = None

    def __call__(
        self,
        query: Tensor,
        k: int,
        reference: Tensor | None = None,
        ref_includes_query: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Each query's k nearest references.

        Args:
            query: (Q, D).
            k: at most as many as there are references are returned.
            reference: (R, D); default: those of :meth:`train`.
            ref_includes_query: whether the first Q references are the queries, which then are not
                among their own neighbours.

        Returns:
            (Q, k) distances in [0, 1], ascending, and (Q, k) int64 indices of references.
        """
        k += ref_includes_query
        graph = self.graph
        if reference is not None:
            check_embeddings(reference, name="reference")
            check_finite(reference=reference)
            are_queries = ref_includes_query and len(query) == len(reference)
            num_candidates = max(k, self.num_candidates) if are_queries else 0
            graph = build_reference_index(reference, self.num_neighbors, num_candidates)
        elif graph is None:
            raise ValueError("there are no references: give some, or call train first")
        elif graph.embeddings.device != query.device:
            graph = self.graph = ReferenceIndex(*(x.to(query.device) for x in graph))
        check_embeddings(query, graph.embeddings.shape[1], name="query")
        check_finite(query=query)
        own = torch.arange(len(query), device=query.device) if ref_includes_query else None
        distances, indices = contextual_rerank(
            query, graph, k, self.num_candidates, self.distance_weight, own
        )
        return return_results(distances, indices, ref_includes_query)

    def train(self, embeddings: Tensor) -> None:
        """Take these references, (R, D), instead of those before."""
        check_embeddings(embeddings)
        check_finite(embeddings=embeddings)
        self.graph = build_reference_index(embeddings, self.num_neighbors)

    def add(self, embeddings: Tensor) -> None:
        """Take these references, (R, D), too."""
        known = [] if self.graph is None else [self.graph.embeddings.to(embeddings.device)]
        self.train(torch.cat([*known, embeddings]))

    def save(self, filename: str | Path) -> None:
        """Write the references, and what was worked out of them, to a file."""
        if self.graph is None:
            raise ValueError("there are no references to save")
        torch.save(self.graph._asdict(), filename)

    def load(self, filename: str | Path) -> None:
        """Read what :meth:`save` wrote, on whatever device; the next query says on which to be."""
        self.graph = ReferenceIndex(**torch.load(filename, map_location="cpu", weights_only=True))

    def reset(self) -> None:
        """Forget the references."""
        self.graph = None

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(num_neighbors={self.num_neighbors},"
            f" num_candidates={self.num_candidates}, distance_weight={self.distance_weight})"
        )
