#!/usr/bin/env python3
"""Mixed precision and torch.compile: the network runs in bfloat16, the loss in float32.

python examples/recipes/mixed_precision.py             # bfloat16
python examples/recipes/mixed_precision.py --compile   # compiled; the first step is slow
"""

from __future__ import annotations

import argparse

import torch
from digits import build_model, embed, load, map_at_r

from pml_extras.losses import CenterContrastiveLoss


def main(steps: int = 100, compile: bool = False) -> float:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    train, test = load()
    model = build_model().to(device)
    loss_func = CenterContrastiveLoss(num_classes=10, embedding_size=32).to(device)
    optimizer = torch.optim.Adam(
        [{"params": model.parameters()}, {"params": loss_func.parameters(), "lr": 0.1}], lr=2e-3
    )

    def forward(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        # Under autocast the embeddings are bfloat16. The loss converts them to float32, because
        # bfloat16 is too imprecise for exponentials and counts. bfloat16 has the range of float32,
        # so there is no GradScaler.
        with torch.autocast(device, torch.bfloat16):
            return loss_func(model(images), labels)

    step = torch.compile(forward) if compile else forward
    for i in range(steps):
        batch = torch.randint(len(train), (64,))
        images, labels = (part[batch].to(device) for part in train.tensors)
        loss = step(images, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if i % 20 == 0:
            print(f"step {i}: loss {loss.item():.3f} in {loss.dtype}")
    score = map_at_r(embed(model, test.tensors[0].to(device)).cpu(), test.tensors[1])
    print(f"MAP@R on held-out images {score:.3f}")
    return score


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--compile", action="store_true")
    main(**vars(parser.parse_args()))
