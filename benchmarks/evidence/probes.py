"""Measurements of the methods' mechanisms, to explain their results."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pml_extras.distillation import SelfDistillation
from pml_extras.functional import contextual_similarity, pairwise_cosine, weighted_label_vote

from .components import Components
from .data import TrainData
from .metrics import embed

NUM_CLASSES, NUM_IMAGES = 32, 256
SLACK = 0.05  # of a neighborhood, in squared distance


class Probes:
    """Measures a fixed sample of the training images after each epoch."""

    def __init__(self, train_data: TrainData, device: torch.device) -> None:
        generator = np.random.default_rng(0)
        labels = np.array(train_data.images.labels)
        classes = generator.permutation(np.unique(labels))[:NUM_CLASSES]
        per_class = NUM_IMAGES // len(classes)
        indices = [i for c in classes for i in np.flatnonzero(labels == c)[:per_class]]
        self.images = train_data.images.subset(indices)
        self.labels = torch.tensor(self.images.labels, device=device)
        true_labels = [train_data.true_labels[i] for i in indices]
        self.true_labels = torch.tensor(true_labels, device=device)
        self.correct = self.true_labels == self.labels
        self.device = device
        self.centers: Tensor | None = None  # of the previous epoch

    @torch.no_grad()
    def measure(
        self, network: nn.Module, components: Components, k: int
    ) -> dict[str, float | None]:
        """`k`: the number of neighbors, including the sample itself."""
        similarities = pairwise_cosine(embed(network, self.images, self.device))
        is_self = torch.eye(len(similarities), dtype=torch.bool, device=self.device)
        neighbors = similarities.masked_fill(is_self, -1).topk(k - 1).indices
        same_class = self.true_labels[neighbors] == self.true_labels[:, None]  # (N, k - 1)
        weights = contextual_weights(similarities, k).masked_fill(is_self, 0)
        is_plurality = weighted_label_vote(weights, self.labels, self.labels).is_plurality
        measured = {
            "mean_cosine": mean_of(similarities[~is_self]),
            "neighborhood_size": mean_of(neighborhood_sizes(similarities, k)),
            "purity": mean_of(same_class.double().mean(1)[self.correct]),
            "plurality_correct": mean_of(is_plurality[self.correct]),
            "plurality_wrong": mean_of(is_plurality[~self.correct]),
        }
        loss: Any = components.loss
        if isinstance(loss, SelfDistillation):
            measured["teacher_entropy"] = self.teacher_entropy(loss)
            loss = loss.loss
        centers = getattr(loss, "centers", getattr(loss, "proxies", None))
        if isinstance(centers, Tensor):
            if self.centers is not None:
                cosine = nn.functional.cosine_similarity(centers, self.centers)
                measured["center_drift"] = 1 - mean_of(cosine)
            self.centers = centers.detach().clone()
        return {name: None if math.isnan(v) else round(v, 4) for name, v in measured.items()}

    def teacher_entropy(self, loss: SelfDistillation) -> float:
        """Mean entropy of the teacher's similarity distributions / entropy of the uniform one."""
        similarities = pairwise_cosine(embed(loss.teacher.network, self.images, self.device))
        log_probs = (similarities / loss.temperature).log_softmax(1)
        entropy = -(log_probs.exp() * log_probs).sum(1).mean()
        return float(entropy) / math.log(len(similarities))


def contextual_weights(similarities: Tensor, k: int) -> Tensor:
    """(N, N) contextual similarity without slack, from (N, N) cosines."""
    return contextual_similarity(2 - 2 * similarities, num_neighbors=k, slack=0.0)


def neighborhood_sizes(similarities: Tensor, k: int) -> Tensor:
    """(N,) how many samples lie within the distance of the k-th neighbor plus the slack."""
    distances = (2 - 2 * similarities).clamp_min(0)
    radius = distances.kthvalue(min(k, len(distances)), dim=1, keepdim=True).values
    return (distances <= radius + SLACK).sum(1)


def mean_of(values: Tensor | Iterable[float]) -> float:
    return float(torch.as_tensor(values).double().mean())  # NaN if there are none
