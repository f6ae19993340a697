from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import normalize

from benchmarks import reference, reranking


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    chosen = np.random.default_rng(0).permutation(len(data.target))[:600]
    x = normalize(torch.tensor(data.data[chosen], dtype=torch.float32))
    return x, data.target[chosen].tolist()


@pytest.mark.parametrize("method", reranking.METHODS)
def test_each_method_ranks_the_others(method, digits):
    x, labels = digits
    ranked = reranking.METHODS[method](x, 30)
    assert ranked.shape == (600, 30)
    assert not (ranked == torch.arange(600)[:, None]).any()
    assert all(len(set(row)) == 30 for row in ranked.tolist())
    map_at_r, precision = reranking.quality(reranking.METHODS[method], x, labels)
    plain_map, _ = reranking.quality(reranking.plain, x, labels)
    assert precision > 0.9
    assert map_at_r >= plain_map


def test_database_augmentation_equals_its_formula(digits):
    x = digits[0][:50].double()
    actual = reference.database_augmentation(x, 4, 3)
    for i, row in enumerate(x):
        similarity = x @ row
        nearest = similarity.argsort(descending=True)[:4]
        mean = sum(similarity[j] ** 3 * x[j] for j in nearest)
        assert torch.allclose(actual[i], mean / mean.norm())
    assert torch.allclose(reference.database_augmentation(x, 1, 3), x)


def test_the_tables_have_a_row_per_method():
    scores = {name: [0.5, 0.75] for name in reranking.SETS}
    results = {
        "threads": 2,
        "quality": dict.fromkeys(reranking.METHODS, scores),
        "seconds": {"5000": {"faiss": 0.5}, "20000": {"faiss": 1.25}},
        "large": {"HNSW32": {"filling": 61.2, "recall": 0.95, "seconds": 300, "peak_gib": 8.04}},
    }
    lines = reranking.render(results).splitlines()
    assert "| ContextualKNN | 0.500, 0.750 | 0.500, 0.750 | 0.500, 0.750 | 0.500, 0.750 |" in lines
    assert "| faiss | 0.50 | 1.25 |" in lines
    assert "| `HNSW32` | 0.950 | 61 | 300 | 8.0 GiB |" in lines
