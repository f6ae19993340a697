"""Shared by the recipes: scikit-learn's scanned digits, a small network, and an accuracy.

The last third of the images, by other writers, is held out. For accuracy on unseen *classes* see
examples/train.py; ten classes are too few for that.
"""

from __future__ import annotations

import numpy as np
import torch
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset


def seed_everything(seed: int = 0) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)  # PML's samplers use NumPy


def load() -> tuple[TensorDataset, TensorDataset]:
    pixels, digits = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    labels = torch.tensor(digits)
    return TensorDataset(images[:1200], labels[:1200]), TensorDataset(images[1200:], labels[1200:])


def build_model(embedding_size: int = 32) -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten()),
        nn.Linear(512, embedding_size),
    )


@torch.no_grad()
def embed(model: nn.Module, images: Tensor) -> Tensor:
    was_training = model.training
    model.eval()
    embeddings: Tensor = nn.functional.normalize(model(images).float())
    model.train(was_training)
    return embeddings


def map_at_r(embeddings: Tensor, labels: Tensor, knn_func: object = None) -> float:
    """MAP@R with each image as a query among the others."""
    calculator = AccuracyCalculator(
        include=("mean_average_precision_at_r",),
        k="max_bin_count",
        device=torch.device("cpu"),
        knn_func=knn_func or CustomKNN(CosineSimilarity()),
    )
    accuracy = calculator.get_accuracy(embeddings, labels)
    return float(accuracy["mean_average_precision_at_r"])
