#!/usr/bin/env python3
"""Training in several processes, with several samples per class in each process's batch.

torchrun --nproc-per-node 2 examples/recipes/distributed.py

PML's wrapper gathers the batches of all processes, so the loss compares the samples of all.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from digits import build_model, embed, load, map_at_r, seed_everything
from pytorch_metric_learning.samplers import MPerClassSampler
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from pml_extras.losses import ContextualLoss


def main(steps: int = 60) -> None:
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    device = torch.device(f"cuda:{rank}" if torch.cuda.is_available() else "cpu")
    seed_everything()  # the same weights on all ranks
    train, test = load()
    model = build_model().to(device)
    parallel = DistributedDataParallel(model)
    loss_func = DistributedLossWrapper(ContextualLoss(num_neighbors=8))
    optimizer = torch.optim.Adam(parallel.parameters(), lr=2e-3)

    # Each rank has its own part of the images, so no image is twice in the gathered batch, and its
    # own seed. PML's sampler is not aware of ranks: with one seed, all ranks would draw the same
    # classes.
    seed_everything(rank)
    part = TensorDataset(*(tensor[rank::world_size] for tensor in train.tensors))
    sampler = MPerClassSampler(
        part.tensors[1], m=4, batch_size=40, length_before_new_iter=40 * steps
    )
    loader = DataLoader(part, batch_size=40, sampler=sampler)
    for step, (images, labels) in enumerate(loader):
        loss = loss_func(parallel(images.to(device)), labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if rank == 0 and step % 20 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    if rank == 0:
        score = map_at_r(embed(model, test.tensors[0].to(device)).cpu(), test.tensors[1])
        print(f"MAP@R on held-out images {score:.3f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=60)
    main(**vars(parser.parse_args()))
