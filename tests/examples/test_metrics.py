"""Recall@K and the gallery, compared with brute force."""

from __future__ import annotations

import pytest
import torch
from metrics import METRICS, RetrievalAccuracy
from samples import Samples


def clustered(classes=12, per_class=5):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(classes).repeat_interleave(per_class)
    centers = torch.randn(classes, 8, generator=generator)
    embeddings = centers[labels] + 0.9 * torch.randn(len(labels), 8, generator=generator)
    return torch.nn.functional.normalize(embeddings), labels.tolist()


def brute_force_recall(similarity, query_labels, reference_labels, k):
    hits = 0
    for row, label in zip(similarity, query_labels, strict=True):
        nearest = row.argsort(descending=True)[:k].tolist()
        hits += any(reference_labels[i] == label for i in nearest)
    return hits / len(query_labels)


def test_recall_among_the_others():
    embeddings, labels = clustered()
    samples = Samples(embeddings, labels, list(map(str, range(12))))
    accuracy = RetrievalAccuracy((1, 2, 4, 30), torch.device("cpu")).evaluate(embeddings, samples)
    assert list(accuracy)[:3] == list(METRICS)
    similarity = (embeddings @ embeddings.T).fill_diagonal_(-2)
    for k in (1, 2, 4, 30):
        expected = brute_force_recall(similarity, labels, labels, k)
        assert accuracy[f"recall_at_{k}"] == pytest.approx(expected)
    assert accuracy["recall_at_1"] == pytest.approx(accuracy["precision_at_1"])
    assert accuracy["recall_at_1"] < accuracy["recall_at_4"] < accuracy["recall_at_30"]


def test_queries_are_searched_in_the_gallery():
    embeddings, labels = clustered()
    is_query = [i % 5 < 2 for i in range(60)]
    samples = Samples(embeddings, labels, list(map(str, range(12))), is_query=is_query)
    accuracy = RetrievalAccuracy((1, 10), torch.device("cpu")).evaluate(embeddings, samples)
    query = torch.tensor(is_query)
    query_labels = [label for label, q in zip(labels, is_query, strict=True) if q]
    gallery_labels = [label for label, q in zip(labels, is_query, strict=True) if not q]
    similarity = embeddings[query] @ embeddings[~query].T
    for k in (1, 10):
        expected = brute_force_recall(similarity, query_labels, gallery_labels, k)
        assert accuracy[f"recall_at_{k}"] == pytest.approx(expected)


def test_more_neighbors_than_samples():
    embeddings, labels = clustered(3, 2)
    samples = Samples(embeddings, labels, list("abc"))
    accuracy = RetrievalAccuracy((1, 1000), torch.device("cpu")).evaluate(embeddings, samples)
    assert accuracy["recall_at_1000"] == 1


def test_the_other_metrics_do_not_depend_on_the_number_of_neighbors():
    embeddings, labels = clustered()
    samples = Samples(embeddings, labels, list(map(str, range(12))))
    plain = RetrievalAccuracy(device=torch.device("cpu")).evaluate(embeddings, samples)
    more = RetrievalAccuracy((50,), torch.device("cpu")).evaluate(embeddings, samples)
    for metric in METRICS:
        assert plain[metric] == pytest.approx(more[metric])
