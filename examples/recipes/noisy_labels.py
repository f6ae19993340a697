#!/usr/bin/env python3
"""From wrong labels to a cleaned training: train, see what is distrusted, train again without it.

python examples/recipes/noisy_labels.py --noise 0.3
"""

from __future__ import annotations

import argparse

import torch
from digits import build_model, embed, load, map_at_r
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.losses import ContrastiveLoss
from pytorch_metric_learning.samplers import MPerClassSampler
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pml_extras.inference import LabelTrust


def train(
    images: Tensor, labels: Tensor, epochs: int, trust: LabelTrust | None = None
) -> nn.Module:
    torch.manual_seed(0)
    model = build_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    loss_func = ContrastiveLoss(0.9, 0.5, distance=CosineSimilarity())
    sampler = MPerClassSampler(labels, m=8, batch_size=80, length_before_new_iter=1600)
    for _ in range(epochs):
        for batch, told in DataLoader(TensorDataset(images, labels), 80, sampler=sampler):
            loss = loss_func(model(batch), told)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if trust:
            trust.look(embed(model, images))  # of all the training images, after each epoch
    return model


def main(epochs: int = 5, noise: float = 0.3) -> dict[str, float]:
    known, held_out = load()
    images, true = known.tensors
    generator = torch.Generator().manual_seed(0)
    is_wrong = torch.rand(len(true), generator=generator) < noise
    shift = torch.randint(1, 10, (len(true),), generator=generator)
    told = torch.where(is_wrong, (true + shift) % 10, true)

    def score(model: nn.Module) -> float:
        return map_at_r(embed(model, held_out.tensors[0]), held_out.tensors[1])

    trust = LabelTrust(told)
    scores = {"with wrong labels": score(train(images, told, epochs, trust))}
    trust.write_csv("labels.csv")  # to look at: the least supported first
    suspects = trust.distrusted()
    kept = torch.ones(len(told), dtype=torch.bool)
    kept[suspects] = False
    found = is_wrong[suspects].float()
    print(f"{len(suspects)} of {len(told)} labels are distrusted: precision {found.mean():.3f}, "
          f"recall {found.sum() / is_wrong.sum():.3f}")  # fmt: skip

    scores["without the distrusted"] = score(train(images[kept], told[kept], epochs))
    repaired = torch.where(kept, told, trust.winner)
    scores["with what the neighbours say"] = score(train(images, repaired, epochs))
    scores["with true labels"] = score(train(images, true, epochs))
    for name, value in scores.items():
        print(f"{name:30} MAP@R on held-out images {value:.3f}")
    return scores


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--noise", type=float, default=0.3)
    main(**vars(parser.parse_args()))
