#!/usr/bin/env python3
"""A training loop in plain PyTorch, with the contextual miner and self-distillation.

python examples/recipes/plain_loop.py
"""

from __future__ import annotations

import argparse

import torch
from digits import build_model, embed, load, map_at_r, seed_everything
from pytorch_metric_learning.losses import MultiSimilarityLoss
from pytorch_metric_learning.samplers import MPerClassSampler
from torch.utils.data import DataLoader

from pml_extras.distillation import SelfDistillation, SnapshotTeacher
from pml_extras.miners import ContextualSimilarityMiner


def main(epochs: int = 5) -> float:
    seed_everything()
    train, test = load()
    model = build_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)

    miner = ContextualSimilarityMiner(num_neighbors=8)
    loss_func = SelfDistillation(MultiSimilarityLoss(), SnapshotTeacher(model), num_epochs=epochs)

    sampler = MPerClassSampler(train.tensors[1], m=8, batch_size=80, length_before_new_iter=1600)
    for epoch in range(epochs):
        for images, labels in DataLoader(train, batch_size=80, sampler=sampler):
            embeddings = model(images)
            # The miner relies on the neighbors, so train one epoch without it first.
            pairs = miner(embeddings, labels) if epoch > 0 else None
            loss = loss_func(embeddings, labels, pairs)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        loss_func.end_epoch()  # the current network becomes the teacher of the next epoch
        score = map_at_r(embed(model, test.tensors[0]), test.tensors[1])
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}, MAP@R on held-out images {score:.3f}")
    return score


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=5)
    main(**vars(parser.parse_args()))
