"""Training a network with a method, as a user would."""

from __future__ import annotations

import contextlib
import ctypes
import math
import random
import time
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from pml_extras.distillation import SelfDistillation

from .components import Components, Hparams
from .examples import Samples, small
from .presets import Budget


class Epoch(Protocol):
    """Each iteration over it is one epoch of batches."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Any: ...


def build_network(images: Samples, budget: Budget) -> nn.Module:
    channels, size, width = images.channels, images.size, budget.width
    first: list[nn.Module] = []
    if budget.pixel_unshuffle:
        first, channels, size = [nn.PixelUnshuffle(2)], 4 * channels, size // 2
    network = nn.Sequential(
        *first, small(channels, size, width), nn.Linear(4 * width, budget.embedding_size)
    )
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def seed_everything(seed: int) -> None:
    for set_seed in (random.seed, np.random.seed, torch.manual_seed):
        set_seed(seed)


class DivergedError(Exception):
    """The loss is not finite."""


def fit(
    network: nn.Module,
    components: Components,
    hparams: Hparams,
    batches: Epoch,
    num_epochs: int,
    after_epoch: Callable[[int, float], None] = lambda epoch, loss: None,
) -> dict[str, float | None]:
    """Train, and return the cost per step. `after_epoch` gets each epoch and its mean loss."""
    optimizers = [torch.optim.Adam(network.parameters(), lr=hparams["lr"])]
    if proxies := list(components.loss.parameters()):
        optimizers.append(torch.optim.Adam(proxies, lr=hparams["proxy_lr"]))
    device = next(network.parameters()).device
    # On a CPU, the time of this process: others may run beside it.
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    seconds, memory = 0.0, None
    for epoch in range(1, num_epochs + 1):
        network.train()
        losses = []
        started = clock()
        with PeakMemory(device) as peak:
            for step, (images, labels) in enumerate(batches):
                progress = ((epoch - 1) + step / len(batches)) / num_epochs
                loss = training_step(network, components, optimizers, images, labels, progress)
                losses.append(loss)
            mean_loss = float(torch.stack(losses).mean())  # synchronizes a GPU
        seconds += clock() - started
        memory = memory or peak.mib  # of the first epoch, before any evaluation
        if not math.isfinite(mean_loss):
            raise DivergedError(f"the loss became {mean_loss} in epoch {epoch}")
        if isinstance(components.loss, SelfDistillation):
            components.loss.end_epoch()
        after_epoch(epoch, mean_loss)
    return {"seconds_per_step": seconds / (num_epochs * len(batches)), "peak_mib": memory}


def training_step(
    network: nn.Module,
    components: Components,
    optimizers: list[torch.optim.Optimizer],
    images: Tensor,
    labels: Tensor,
    progress: float,
) -> Tensor:
    if components.schedule:
        components.schedule(progress)
    embeddings = network(images)
    miner = components.miner if progress >= components.miner_start else None
    pairs = miner(embeddings, labels) if miner is not None else None
    loss: Tensor = components.loss(embeddings, labels, pairs)
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
    return loss.detach()


class PeakMemory:
    """`mib`: the peak memory inside the block minus the memory before it, or None if unknown."""

    mib: float | None = None

    def __init__(self, device: torch.device) -> None:
        self.device, self.before = device, 0

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
        else:
            with contextlib.suppress(OSError, AttributeError):  # Linux with glibc only
                ctypes.CDLL(None).malloc_trim(0)  # return freed memory to the system
                with open("/proc/self/clear_refs", "w") as file:
                    file.write("5")  # reset the peak
                self.before = resident("VmRSS")
        return self

    def __exit__(self, *exception: object) -> None:
        if self.device.type == "cuda":
            self.mib = (torch.cuda.max_memory_allocated(self.device) - self.before) / 2**20
        elif self.before:
            self.mib = (resident("VmHWM") - self.before) / 2**20


def resident(field: str) -> int:
    """A field of this process's status, in bytes."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))
