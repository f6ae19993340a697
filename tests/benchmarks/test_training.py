"""What is measured, on embeddings whose measure is known."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from datasets import Images

from benchmarks.evidence import training
from benchmarks.evidence.data import Training
from benchmarks.evidence.plan import Parts

CPU = torch.device("cpu")


def clusters(classes, each, spread, dimensions=16):
    torch.manual_seed(0)
    labels = torch.arange(classes).repeat_interleave(each)
    x = torch.randn(classes, dimensions)[labels] + spread * torch.randn(len(labels), dimensions)
    return torch.nn.functional.normalize(x), labels.tolist()


def test_few_shot_of_tight_clusters_and_of_noise():
    tight, labels = clusters(30, 7, 1e-3)
    assert training.few_shot(tight, labels, 5, 5) == 1
    noise, _ = clusters(30, 7, 1e3)
    found = training.few_shot(noise, labels, 5, 1)
    assert found == pytest.approx(0.2, abs=0.04)
    assert found == training.few_shot(noise, labels, 5, 1)  # the same episodes


def test_few_shot_never_shows_the_query_and_copes_with_small_classes():
    # Two images a class, which are opposites: one shot is always misleading.
    x = torch.eye(8).repeat_interleave(2, 0)
    x[1::2] *= -1
    labels = [c for c in range(8) for _ in range(2)]
    assert training.few_shot(x, labels, 2, 1) < 0.01
    uneven, numbers = clusters(12, 8, 1e-3)
    kept = [i for i, label in enumerate(numbers) if label % 2 or i % 8 < 3]
    assert training.few_shot(uneven[kept], [numbers[i] for i in kept], 5, 2) == 1


def test_retrieval_of_rare_classes_is_that_of_their_images():
    x, labels = clusters(6, 10, 0.8)
    every = training.retrieval(x, labels)
    parts = [training.retrieval(x, labels, rare=[label])["map_at_r"] for label in range(6)]
    assert np.mean(parts) == pytest.approx(every["map_at_r"])
    assert training.retrieval(x, labels, rare=[1, 4])["map_at_r"] == pytest.approx(
        (parts[1] + parts[4]) / 2
    )


def test_re_ranking_is_chosen_on_validation_data():
    validation, test = clusters(8, 8, 0.6), clusters(9, 8, 0.6)
    found = training.reranked(validation, test)
    by_k = {
        k: training.retrieval(*validation, training.ContextualKNN(num_neighbors=k))
        for k in (5, 10, 20)
    }
    assert found["reranked_k"] == max(by_k, key=lambda k: by_k[k]["map_at_r"])
    again = training.retrieval(*test, training.ContextualKNN(num_neighbors=found["reranked_k"]))
    assert found["reranked_map_at_r"] == again["map_at_r"]


class Flat(torch.nn.Module):
    """Embeds an image as its first pixels: what they are is the test's choice."""

    def forward(self, x):
        return x.flatten(1)[:, :8]


def test_probes_tell_right_labels_from_wrong_ones():
    true = [c for c in range(4) for _ in range(16)]
    pixels = torch.zeros(64, 1, 4, 4, dtype=torch.uint8)
    for i, label in enumerate(true):
        pixels[i, 0].view(-1)[label] = 255 - i % 16
    told = [3 - label if i % 16 == 0 else label for i, label in enumerate(true)]
    images = Images(pixels, told, list("abcd"), 4)
    probes = training.Probes(Training(images, true, images), CPU)
    found = probes.measure(Flat(), Parts(torch.nn.Identity()), 4)
    assert found["purity"] == 1
    assert found["trusted_right"] == 1
    assert found["trusted_wrong"] == 0
    clean = training.Probes(Training(images, told, images), CPU)
    assert clean.measure(Flat(), Parts(torch.nn.Identity()), 4)["trusted_wrong"] is None


def test_embeddings_that_are_no_numbers_find_nothing():
    images = Images(torch.zeros(4, 1, 4, 4, dtype=torch.uint8), [0, 0, 1, 1], ["a", "b"], 4)

    class Broken(torch.nn.Module):
        def forward(self, x):
            return x.flatten(1) * float("nan")

    assert torch.equal(training.embed(Broken(), images, CPU), torch.zeros(4, 16))


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is Linux's")
def test_peak_memory():
    with training.PeakMemory(CPU) as peak:
        torch.ones(32 * 2**20 // 4).sum()
    assert 30 < peak.mib < 60
