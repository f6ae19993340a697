#!/usr/bin/env python3
"""Several processes, with PML's wrapper: every process compares its samples with those of all.

torchrun --nproc-per-node 2 examples/recipes/distributed.py
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from digits import build_model, embed, load, map_at_r
from pytorch_metric_learning.samplers import MPerClassSampler
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper
from torch.nn.parallel import DistributedDataParallel

from pml_extras.losses import ContextualLoss


def main(steps: int = 60) -> None:
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device(f"cuda:{rank}" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    train, test = load()
    model = build_model().to(device)
    parallel = DistributedDataParallel(model)
    loss_func = DistributedLossWrapper(ContextualLoss(num_neighbors=8))
    optimizer = torch.optim.Adam(parallel.parameters(), lr=2e-3)

    # The same batches on all ranks, of which each takes its share: all of a class's samples may lie
    # on one rank, because the wrapper joins the batch again.
    sampler = MPerClassSampler(train.tensors[1], m=8, batch_size=80)
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    for step in range(steps):
        batch = torch.tensor(list(sampler)[:80])
        batch = batch[torch.randperm(80, generator=generator)]
        dist.broadcast(batch, 0)
        images, labels = (part[batch[rank::world]].to(device) for part in train.tensors)
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
