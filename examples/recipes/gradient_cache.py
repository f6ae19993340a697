#!/usr/bin/env python3
"""A loss on 4,096 images with the memory of 64: gradient caching (arXiv 2101.06983).

python examples/recipes/gradient_cache.py

The loss of a batch needs the embeddings of all its images at once, but the network does not need
all images at once. So the gradient of the embeddings is computed first, and then passed on to the
network, one chunk of images at a time. This takes a second forward pass. The gradient is that of
the whole batch.

The network must embed an image in the same way in both passes, and in every batch: use frozen
batch normalization or none. Dropout draws the same numbers in both passes.
"""

from __future__ import annotations

import argparse
import copy

import torch
from digits import build_model, embed, load, map_at_r, seed_everything
from torch import Tensor, nn

from pml_extras.losses import ContextualLoss


def cached_backward(
    model: nn.Module, loss_func: nn.Module, images: Tensor, labels: Tensor, chunk_size: int
) -> Tensor:
    """Like ``loss_func(model(images), labels).backward()``. Returns the loss."""
    chunks = images.split(chunk_size)
    devices = [images.device] if images.is_cuda else []
    # 1. Embed all chunks, without a graph. The random numbers are drawn again in step 3.
    with torch.no_grad(), torch.random.fork_rng(devices):
        embeddings = torch.cat([model(chunk) for chunk in chunks])
    # 2. The loss, and the gradient of the embeddings.
    embeddings.requires_grad_()
    with torch.random.fork_rng(devices):
        loss: Tensor = loss_func(embeddings, labels)
    loss.backward()
    # 3. Embed each chunk again, with a graph, and pass on its part of the gradient.
    assert embeddings.grad is not None
    for chunk, grad in zip(chunks, embeddings.grad.split(chunk_size), strict=True):
        model(chunk).backward(grad)
    return loss.detach()


def largest_difference(
    model: nn.Module, loss_func: nn.Module, images: Tensor, labels: Tensor, chunk_size: int
) -> float:
    """Between the gradients of the cached and of the whole batch, relative to the largest one."""
    whole = copy.deepcopy(model)
    loss_func(whole(images), labels).backward()
    cached = copy.deepcopy(model)
    cached_backward(cached, loss_func, images, labels, chunk_size)
    differences, largest = [], []
    for p, q in zip(cached.parameters(), whole.parameters(), strict=True):
        differences.append((p.grad - q.grad).abs().max())
        largest.append(q.grad.abs().max())
    return float(max(differences) / max(largest))


def main(batch_size: int = 4096, chunk_size: int = 64, steps: int = 5) -> tuple[float, float]:
    seed_everything()
    train, test = load()
    images, labels = train.tensors

    def draw() -> tuple[Tensor, Tensor]:
        """Noisy images, because there are only 1,200."""
        batch = torch.randint(len(images), (batch_size,))
        return images[batch] + 0.2 * torch.randn(batch_size, *images.shape[1:]), labels[batch]

    model = build_model()
    loss_func = ContextualLoss(num_neighbors=batch_size // 10)  # samples per class
    difference = largest_difference(model, loss_func, *draw(), chunk_size)
    print(f"largest difference from the gradient of the whole batch: {difference:.1e}", flush=True)

    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for step in range(steps):
        optimizer.zero_grad()
        loss = cached_backward(model, loss_func, *draw(), chunk_size)
        optimizer.step()
        print(f"step {step}: loss {loss.item():.4f}", flush=True)
    score = map_at_r(embed(model, test.tensors[0]), test.tensors[1])
    print(f"MAP@R on held-out images {score:.3f}", flush=True)
    return difference, score


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--chunk-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=5)
    main(**vars(parser.parse_args()))
