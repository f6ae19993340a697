"""Retrieval accuracy: PML's AccuracyCalculator, with Recall@K."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN
from samples import Samples
from torch import Tensor

from pml_extras.inference import ContextualKNN

METRICS = {
    "precision_at_1": "precision@1",
    "r_precision": "R-precision",
    "mean_average_precision_at_r": "MAP@R",
}
PRIMARY_METRIC = "mean_average_precision_at_r"


class RetrievalAccuracy(AccuracyCalculator):
    """The METRICS, and Recall@K: the fraction of queries with a match among the K nearest.

    It finds enough neighbors for all of them. It needs no faiss.
    """

    def __init__(
        self,
        recall_at: Sequence[int] = (),
        device: torch.device | None = None,
        rerank: bool = False,
    ) -> None:
        self.recall_at = recall_at
        self.metrics = (*METRICS, *(f"recall_at_{k}" for k in recall_at))
        for k in recall_at:
            setattr(self, f"calculate_recall_at_{k}", partial(self.recall, k))
        knn = ContextualKNN() if rerank else CustomKNN(CosineSimilarity(), batch_size=1024)
        super().__init__(self.metrics, k="max_bin_count", device=device, knn_func=knn)

    def determine_k(self, bin_counts: Tensor, num_references: int, ref_includes_query: bool) -> int:
        k: int = super().determine_k(bin_counts, num_references, ref_includes_query)
        return min(max(k, *self.recall_at, 0), num_references - ref_includes_query)

    def recall(
        self,
        k: int,
        knn_labels: Tensor,
        query_labels: Tensor,
        not_lone_query_mask: Tensor,
        label_comparison_fn: Any,
        **_: Any,
    ) -> float:
        is_match = label_comparison_fn(query_labels[:, None], knn_labels[:, :k]).any(1)
        return float(is_match[not_lone_query_mask].double().mean())

    def evaluate(self, embeddings: Tensor, samples: Samples) -> dict[str, float]:
        """Each sample is a query among the others, or the queries are searched in the gallery."""
        labels = torch.tensor(samples.labels)
        if samples.is_query is None:
            accuracy = self.get_accuracy(embeddings, labels)
        else:
            query = torch.tensor(samples.is_query)
            accuracy = self.get_accuracy(
                embeddings[query], labels[query], embeddings[~query], labels[~query]
            )
        return {metric: accuracy[metric] for metric in self.metrics}


def label(metric: str) -> str:
    return METRICS.get(metric, metric.replace("_at_", "@"))
