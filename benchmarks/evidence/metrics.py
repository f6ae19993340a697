"""Names of the metrics, and how they are measured."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN
from torch import Tensor, nn

from pml_extras.inference import ContextualKNN

from .data import normalize_pixels
from .examples import Samples

MAP = "map_at_r"
P1 = "precision_at_1"
R_PRECISION = "r_precision"
PML_NAMES = {P1: P1, R_PRECISION: R_PRECISION, MAP: "mean_average_precision_at_r"}
RERANKED = "reranked_map_at_r"
RERANKED_P1 = "reranked_precision_at_1"
RARE = "rare_map_at_r"
ACCURACY = "accuracy"
FEW_SHOT = {  # ways, shots
    f"{ways}-way {shots}-shot": (ways, shots) for ways in (5, 20) for shots in (1, 5)
}
RERANKING_NEIGHBORS = (5, 10, 20)

Metrics = dict[str, float]


@torch.no_grad()
def embed(network: nn.Module, images: Samples, device: torch.device) -> Tensor:
    """(N, D) normalized embeddings; a row is 0 if the network's output is not finite."""
    assert isinstance(images.source, Tensor)
    network.eval()
    outputs = [network(normalize_pixels(p.to(device))) for p in images.source.split(512)]
    return nn.functional.normalize(torch.nan_to_num(torch.cat(outputs), 0, 0, 0))


def retrieval(
    embeddings: Tensor,
    labels: Sequence[int],
    knn: Any = None,
    include: Collection[str] = tuple(PML_NAMES),
    rare: Collection[int] | None = None,
) -> Metrics:
    """Each image is a query against all others. With `rare`, average over these classes only."""
    calculator = AccuracyCalculator(
        include=tuple(PML_NAMES[name] for name in include),
        k="max_bin_count",
        device=embeddings.device,
        return_per_class=rare is not None,
        knn_func=knn or CustomKNN(CosineSimilarity(), batch_size=1024),
    )
    accuracy = calculator.get_accuracy(embeddings, torch.tensor(labels, device=embeddings.device))
    scores = {name: accuracy[PML_NAMES[name]] for name in include}
    if rare is None:
        return scores
    return {name: float(np.mean([s[label] for label in rare])) for name, s in scores.items()}


def reranked(validation: tuple[Tensor, Sequence[int]], test: tuple[Tensor, Sequence[int]]) -> Any:
    """Test metrics with contextual re-ranking; validation data choose the number of neighbors."""
    on_validation = {
        k: retrieval(*validation, ContextualKNN(num_neighbors=k), [MAP])[MAP]
        for k in RERANKING_NEIGHBORS
    }
    k = max(RERANKING_NEIGHBORS, key=on_validation.__getitem__)
    scores = retrieval(*test, ContextualKNN(num_neighbors=k), [MAP, P1])
    return {RERANKED: scores[MAP], RERANKED_P1: scores[P1], "reranked_k": k}


def few_shot(
    embeddings: Tensor, labels: Sequence[int], ways: int, shots: int, episodes: int = 1000
) -> float:
    """Accuracy of the nearest class mean, in the same random episodes for every network.

    An episode has `ways` classes, each with `shots` support images and one query.
    """
    generator = np.random.default_rng(0)
    labels = np.array(labels)
    members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    sizes = np.array([len(m) for m in members])
    table = np.stack([np.resize(m, sizes.max()) for m in members])  # (classes, largest class)
    classes = generator.random((episodes, len(members))).argsort(1)[:, :ways, None]
    order = generator.random((episodes, ways, sizes.max()))
    order[np.arange(sizes.max()) >= sizes[classes]] = 2  # sort the padding last
    drawn = torch.from_numpy(table[classes, order.argsort(2)[..., : shots + 1]])
    drawn = drawn.to(embeddings.device)  # (episodes, ways, shots + 1)
    means = nn.functional.normalize(embeddings[drawn[..., :shots]].mean(2), dim=2)
    predicted = (embeddings[drawn[..., shots]] @ means.mT).argmax(2)  # (episodes, ways)
    correct = predicted == torch.arange(ways, device=embeddings.device)
    return correct.double().mean().item()


@torch.no_grad()
def classification(network: nn.Module, loss: Any, images: Samples, device: torch.device) -> Metrics:
    assert isinstance(images.source, Tensor)
    network.eval()
    predicted = [
        loss.get_logits(network(normalize_pixels(pixels.to(device)))).argmax(1)
        for pixels in images.source.split(512)
    ]
    labels = torch.tensor(images.labels, device=device)
    return {ACCURACY: (torch.cat(predicted) == labels).double().mean().item()}
