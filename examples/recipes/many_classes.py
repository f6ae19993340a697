#!/usr/bin/env python3
"""Very many classes on one device, with EMA centers.

For more classes than one device can hold see examples/sharded_centers.py.

    python examples/recipes/many_classes.py --classes 1000000
"""

from __future__ import annotations

import argparse
import time

import torch

from pml_extras.losses import CenterContrastiveLoss


def main(classes: int = 100_000, steps: int = 5, embedding_size: int = 64) -> list[float]:
    torch.manual_seed(0)
    model = torch.nn.Linear(16, embedding_size)
    # EMA centers need no gradients and no optimizer state. With Adam they would take four times the
    # memory.
    loss_func = CenterContrastiveLoss(classes, embedding_size, center_update="ema")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    prototypes = torch.randn(classes, 16)
    losses = []
    for step in range(steps):
        labels = torch.randint(classes, (256,))
        inputs = prototypes[labels] + 0.1 * torch.randn(256, 16)
        started = time.perf_counter()
        loss = loss_func(model(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        num_seen = int((loss_func.class_counts > 0).sum())
        print(f"step {step}: loss {losses[-1]:.3f}, {num_seen} classes seen,"
              f" {time.perf_counter() - started:.2f} s")  # fmt: skip
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--classes", type=int, default=100_000)
    parser.add_argument("--steps", type=int, default=5)
    main(**vars(parser.parse_args()))
