"""Metrics and probes on embeddings with known results, and the memory measurement."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from samples import Samples

from benchmarks.evidence import metrics
from benchmarks.evidence.components import Components
from benchmarks.evidence.data import TrainData
from benchmarks.evidence.probes import Probes
from benchmarks.evidence.training import PeakMemory

CPU = torch.device("cpu")


def clusters(num_classes, per_class, spread, dimensions=16):
    torch.manual_seed(0)
    labels = torch.arange(num_classes).repeat_interleave(per_class)
    x = torch.randn(num_classes, dimensions)[labels] + spread * torch.randn(len(labels), dimensions)
    return torch.nn.functional.normalize(x), labels.tolist()


def test_few_shot_of_tight_clusters_and_noise():
    tight, labels = clusters(30, 7, 1e-3)
    assert metrics.few_shot(tight, labels, 5, 5) == 1
    noise, _ = clusters(30, 7, 1e3)
    found = metrics.few_shot(noise, labels, 5, 1)
    assert found == pytest.approx(0.2, abs=0.04)
    assert found == metrics.few_shot(noise, labels, 5, 1)  # the same episodes


def test_few_shot_excludes_the_query_and_allows_small_classes():
    # Two opposite images per class, so one shot always misleads.
    x = torch.eye(8).repeat_interleave(2, 0)
    x[1::2] *= -1
    labels = [c for c in range(8) for _ in range(2)]
    assert metrics.few_shot(x, labels, 2, 1) < 0.01
    uneven, numbers = clusters(12, 8, 1e-3)
    kept = [i for i, label in enumerate(numbers) if label % 2 or i % 8 < 3]
    assert metrics.few_shot(uneven[kept], [numbers[i] for i in kept], 5, 2) == 1


def test_retrieval_of_rare_classes_averages_over_their_images():
    x, labels = clusters(6, 10, 0.8)
    every = metrics.retrieval(x, labels)
    parts = [metrics.retrieval(x, labels, rare=[label])["map_at_r"] for label in range(6)]
    assert np.mean(parts) == pytest.approx(every["map_at_r"])
    assert metrics.retrieval(x, labels, rare=[1, 4])["map_at_r"] == pytest.approx(
        (parts[1] + parts[4]) / 2
    )


def test_validation_data_choose_the_neighbors_of_reranking():
    validation, test = clusters(8, 8, 0.6), clusters(9, 8, 0.6)
    found = metrics.reranked(validation, test)
    by_k = {
        k: metrics.retrieval(*validation, metrics.ContextualKNN(num_neighbors=k))
        for k in (5, 10, 20)
    }
    assert found["reranked_k"] == max(by_k, key=lambda k: by_k[k]["map_at_r"])
    again = metrics.retrieval(*test, metrics.ContextualKNN(num_neighbors=found["reranked_k"]))
    assert found["reranked_map_at_r"] == again["map_at_r"]


class Flat(torch.nn.Module):
    """The embedding of an image is its first pixels."""

    def forward(self, x):
        return x.flatten(1)[:, :8]


def test_probes_separate_correct_and_wrong_labels():
    true = [c for c in range(4) for _ in range(16)]
    pixels = torch.zeros(64, 1, 4, 4, dtype=torch.uint8)
    for i, label in enumerate(true):
        pixels[i, 0].view(-1)[label] = 255 - i % 16
    noisy = [3 - label if i % 16 == 0 else label for i, label in enumerate(true)]
    images = Samples(pixels, noisy, list("abcd"))
    components = Components(torch.nn.Identity())
    found = Probes(TrainData(images, true, images), CPU).measure(Flat(), components, 4)
    assert found["purity"] == 1
    assert found["plurality_correct"] == 1
    assert found["plurality_wrong"] == 0
    clean = Probes(TrainData(images, noisy, images), CPU)
    assert clean.measure(Flat(), components, 4)["plurality_wrong"] is None


def test_embeddings_that_are_not_finite_are_zero():
    images = Samples(torch.zeros(4, 1, 4, 4, dtype=torch.uint8), [0, 0, 1, 1], ["a", "b"])

    class Broken(torch.nn.Module):
        def forward(self, x):
            return x.flatten(1) * float("nan")

    assert torch.equal(metrics.embed(Broken(), images, CPU), torch.zeros(4, 16))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory():
    with PeakMemory(CPU) as peak:
        torch.ones(32 * 2**20 // 4).sum()
    assert 30 < peak.mib < 60
