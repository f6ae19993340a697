#!/usr/bin/env python3
"""Training in several processes, with PML's wrapper: the loss sees the samples of all processes.

torchrun --nproc-per-node 2 examples/recipes/distributed.py
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from digits import build_model, embed, load, map_at_r, seed_everything
from pytorch_metric_learning.samplers import MPerClassSampler
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper
from torch.nn.parallel import DistributedDataParallel

from pml_extras.losses import ContextualLoss


def main(steps: int = 60) -> None:
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    device = torch.device(f"cuda:{rank}" if torch.cuda.is_available() else "cpu")
    seed_everything()
    train, test = load()
    model = build_model().to(device)
    parallel = DistributedDataParallel(model)
    loss_func = DistributedLossWrapper(ContextualLoss(num_neighbors=8))
    optimizer = torch.optim.Adam(parallel.parameters(), lr=2e-3)

    # All ranks have the same seed, so they draw the same batch. Each takes its part. The samples of
    # a class may all be on one rank, because the wrapper joins the parts.
    sampler = MPerClassSampler(train.tensors[1], m=8, batch_size=80, length_before_new_iter=80)
    for step in range(steps):
        batch = torch.tensor(list(sampler))[torch.randperm(80)]
        images, labels = (part[batch[rank::world_size]].to(device) for part in train.tensors)
        loss = loss_func(parallel(images), labels)
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
