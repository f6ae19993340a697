#!/usr/bin/env python3
"""Train with more classes than one process can hold: each process holds a shard of the centers.

    torchrun --nproc-per-node 2 examples/sharded_centers.py --out runs/centers
    torchrun --nproc-per-node 4 examples/sharded_centers.py --out runs/centers --resume

The second command resumes the first with twice as many processes. The task is synthetic: to
recognize people, of whom there are many, from a few noisy measurements of each. Accuracy is
measured on people who are not in the training set, with one measurement per person as reference.
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
    """Synthetic classes: a measurement is a nonlinear mixture of a person's traits, with noise."""

    def __init__(self, number: int, seed: int) -> None:
        self.traits = torch.randn(number, TRAITS, generator=torch.Generator().manual_seed(seed))
        self.mixing = torch.randn(TRAITS, MEASUREMENTS, generator=torch.Generator().manual_seed(0))

    def measure(self, people: Tensor, generator: torch.Generator) -> Tensor:
        """(N, MEASUREMENTS) for (N,) indices of people."""
        signal = (self.traits[people] @ self.mixing / 2).sin()
        return signal + 0.7 * torch.randn(signal.shape, generator=generator)


@torch.no_grad()
def accuracy(network: nn.Module, people: People, device: torch.device) -> float:
    """The fraction of people whose second measurement is closest to their first one."""
    indices = torch.arange(len(people.traits))
    generator = torch.Generator().manual_seed(0)
    first, second = (
        normalize(network(people.measure(indices, generator).to(device))) for _ in range(2)
    )
    nearest = (second @ first.T).argmax(1)
    return (nearest.cpu() == indices).float().mean().item()


class Training:
    """The network, replicated on all ranks, and the loss, whose centers are sharded."""

    def __init__(self, num_classes: int, device: torch.device) -> None:
        torch.manual_seed(0)
        self.network = nn.Sequential(
            nn.Linear(MEASUREMENTS, 256), nn.ReLU(), nn.Linear(256, EMBEDDING_SIZE)
        ).to(device)
        # DistributedDataParallel averages the network's gradients. The centers must not be in it.
        self.parallel = DistributedDataParallel(self.network)
        self.loss_func = ShardedCenterContrastiveLoss(num_classes, EMBEDDING_SIZE)
        self.optimizer = torch.optim.Adam(
            [
                {"params": self.parallel.parameters(), "lr": 1e-3},
                {"params": self.loss_func.parameters(), "lr": 0.1},
            ]
        )
        self.modules = nn.ModuleDict({"network": self.parallel, "loss": self.loss_func})
        self.step = 0

    def state(self) -> dict[str, object]:
        modules, optimizer = get_state_dict(self.modules, self.optimizer)
        return {"modules": modules, "optimizer": optimizer, "step": self.step}

    # Each rank writes and reads its own shard. torch.distributed.checkpoint reshards the centers
    # and their optimizer state if the number of ranks has changed.

    def save(self, path: Path) -> None:
        dcp.save(self.state(), checkpoint_id=path)

    def load(self, path: Path) -> None:
        state = self.state()
        dcp.load(state, checkpoint_id=path)
        set_state_dict(
            self.modules,
            self.optimizer,
            model_state_dict=state["modules"],
            optim_state_dict=state["optimizer"],
        )
        self.step = state["step"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="directory of the checkpoints")
    parser.add_argument("--resume", action="store_true", help="resume from the latest checkpoint")
    parser.add_argument("--people", type=int, default=10_000, help="classes (default: %(default)s)")
    parser.add_argument(
        "--steps", type=int, default=200, help="training steps (default: %(default)s)"
    )
    parser.add_argument("--batch-size", type=int, default=512, help="of all processes together")
    args = parser.parse_args()

    # torchrun sets the rank and the number of processes in the environment.
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpu else "gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()

    def print_once(text: str) -> None:
        if rank == 0:
            print(text, flush=True)

    training = Training(args.people, device)
    shard = training.loss_func.centers.to_local()
    print_once(f"{world_size} processes; the first holds {len(shard):,} of {args.people:,} centers")
    if args.resume:
        # The metadata is written last, so a checkpoint that has it is complete.
        latest = max(args.out.glob("step-*/.metadata"), default=None)
        if latest is None:
            parser.error(f"there is no checkpoint in {args.out}")
        training.load(latest.parent)
        print_once(f"resuming from {latest.parent}")

    people, unseen_people = People(args.people, seed=1), People(2_000, seed=2)
    score = accuracy(training.network, unseen_people, device)
    print_once(f"step {training.step:5}  accuracy {score:.3f}")
    for i in range(1, args.steps + 1):
        training.step += 1
        # All ranks draw the same batch, with the step as seed, and each takes its part. (With a
        # dataset, use DataLoader and DistributedSampler.)
        generator = torch.Generator().manual_seed(training.step)
        labels = torch.randint(args.people, (args.batch_size,), generator=generator)
        inputs = people.measure(labels, generator)
        local_inputs = inputs.tensor_split(world_size)[rank].to(device)
        local_labels = labels.tensor_split(world_size)[rank].to(device)

        training.optimizer.zero_grad()
        # The loss is that of the whole batch, equal on all ranks.
        loss = training.loss_func(training.parallel(local_inputs), local_labels)
        loss.backward()
        training.optimizer.step()
        if i % max(1, args.steps // 5) == 0:
            print_once(f"step {training.step:5}  loss {loss.item():.4f}")
    score = accuracy(training.network, unseen_people, device)
    print_once(f"step {training.step:5}  accuracy {score:.3f}")

    path = args.out / f"step-{training.step:06}"
    training.save(path)
    print_once(f"saved {path}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
