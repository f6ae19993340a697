#!/usr/bin/env python3
"""Train with more classes than one process should hold: each holds the centers of a part of them.

    torchrun --nproc-per-node 2 examples/sharded_centers.py --out runs/centers
    torchrun --nproc-per-node 4 examples/sharded_centers.py --out runs/centers --resume

The second command goes on where the first one stopped, with twice the processes. The task is made
up: to recognise people, of whom there are many, from a few noisy measurements each. Accuracy is
that of finding a person among others whom training never saw, given one measurement of each.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

from pml_extras.losses import ShardedCenterContrastiveLoss

MEASUREMENTS, TRAITS, EMBEDDING_SIZE = 64, 16, 64


class People:
    """What is measured of a person: a mixture of their traits, with noise."""

    def __init__(self, number: int, seed: int) -> None:
        self.traits = torch.randn(number, TRAITS, generator=torch.Generator().manual_seed(seed))
        self.mixing = torch.randn(TRAITS, MEASUREMENTS, generator=torch.Generator().manual_seed(0))

    def measure(self, people: Tensor, generator: torch.Generator) -> Tensor:
        """(N, MEASUREMENTS), for (N,) numbers of people."""
        signal = (self.traits[people] @ self.mixing / 2).sin()
        return signal + 0.7 * torch.randn(signal.shape, generator=generator)


@torch.no_grad()
def accuracy(network: nn.Module, people: People, device: torch.device) -> float:
    """How often a second measurement is closest to the same person's first one."""
    everyone = torch.arange(len(people.traits))
    generator = torch.Generator().manual_seed(0)
    first, second = (
        normalize(network(people.measure(everyone, generator).to(device))) for _ in range(2)
    )
    found = (second @ first.T).argmax(1)
    return (found.cpu() == everyone).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="where checkpoints go")
    parser.add_argument("--resume", action="store_true", help="go on from the latest checkpoint")
    parser.add_argument("--people", type=int, default=10_000, help="classes (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="of training (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=512, help="of all processes together")
    args = parser.parse_args()

    # torchrun says in the environment which of how many processes this one is.
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpu else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()

    def say(text: str) -> None:
        if rank == 0:
            print(text, flush=True)

    # The network is on all ranks alike, and DistributedDataParallel averages its gradients. Of the
    # centers each rank has its own, and nothing averages theirs.
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Linear(MEASUREMENTS, 256), nn.ReLU(), nn.Linear(256, EMBEDDING_SIZE)
    ).to(device)
    loss_func = ShardedCenterContrastiveLoss(args.people, EMBEDDING_SIZE)
    parallel = DistributedDataParallel(network)
    optimizer = torch.optim.Adam(
        [
            {"params": parallel.parameters(), "lr": 1e-3},
            {"params": loss_func.parameters(), "lr": 0.1},
        ]
    )
    modules = nn.ModuleDict({"network": parallel, "loss": loss_func})
    part = loss_func.centers.to_local()
    say(f"{world} processes; the first holds {len(part):,} of {args.people:,} centers")

    # Each rank writes and reads its own part; torch.distributed.checkpoint knows which rows of the
    # centers, and of their optimizer's state, are whose, however many ranks there were.
    def state(step: int) -> dict[str, object]:
        module_state, optimizer_state = get_state_dict(modules, optimizer)
        return {"modules": module_state, "optimizer": optimizer_state, "step": step}

    first_step = 0
    if args.resume:
        # The metadata is written last, so where it is the checkpoint is whole.
        latest = max(args.out.glob("step-*/.metadata"), default=None)
        if latest is None:
            parser.error(f"there is no checkpoint in {args.out}")
        loaded = state(0)
        dcp.load(loaded, checkpoint_id=latest.parent)
        set_state_dict(
            modules,
            optimizer,
            model_state_dict=loaded["modules"],
            optim_state_dict=loaded["optimizer"],
        )
        first_step = loaded["step"]
        say(f"going on from {latest.parent}")

    people, strangers = People(args.people, seed=1), People(2_000, seed=2)
    say(f"step {first_step:5}  accuracy {accuracy(network, strangers, device):.3f}")
    last_step = first_step + args.steps
    for step in range(first_step + 1, last_step + 1):
        # All ranks draw the same batch, whose number is its seed, and each takes its share. (With a
        # data set: DataLoader and DistributedSampler.)
        generator = torch.Generator().manual_seed(step)
        labels = torch.randint(args.people, (args.batch_size,), generator=generator)
        inputs = people.measure(labels, generator)
        own_inputs = inputs.tensor_split(world)[rank].to(device)
        own_labels = labels.tensor_split(world)[rank].to(device)

        optimizer.zero_grad()
        loss = loss_func(parallel(own_inputs), own_labels)  # that of the whole batch, on all ranks
        loss.backward()
        optimizer.step()
        if step % max(1, args.steps // 5) == 0:
            say(f"step {step:5}  loss {loss.item():.4f}")
    say(f"step {last_step:5}  accuracy {accuracy(network, strangers, device):.3f}")

    checkpoint = args.out / f"step-{last_step:06}"
    dcp.save(state(last_step), checkpoint_id=checkpoint)
    say(f"saved {checkpoint}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
