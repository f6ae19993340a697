"""Adam for each part, and the schedule of the learning rates."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Callable

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

SCHEDULES = ("none", "cosine", "multistep")
# The contextual loss's authors: times 0.3 after 15, 30 and 45 of 80 epochs.
MILESTONES, GAMMA = (15 / 80, 30 / 80, 45 / 80), 0.3


def build_optimizers(
    args: Namespace, models: dict[str, nn.Module], loss: nn.Module
) -> dict[str, Optimizer]:
    lrs = {"trunk": args.trunk_lr, "embedder": args.lr, "metric_loss": args.loss_lr}
    # Proxies and centers are parameters of the loss. Without an optimizer they never move.
    parts = {**models, "metric_loss": loss}
    trained = {
        name: [p for p in part.parameters() if p.requires_grad] for name, part in parts.items()
    }
    decay = {"trunk": args.weight_decay, "embedder": args.weight_decay, "metric_loss": 0.0}
    return {
        f"{name}_optimizer": torch.optim.Adam(parameters, lrs[name], weight_decay=decay[name])
        for name, parameters in trained.items()
        if parameters
    }


def build_schedulers(
    args: Namespace, optimizers: dict[str, Optimizer], steps_per_epoch: int
) -> dict[str, LambdaLR]:
    factor = lr_factor(args.schedule, args.warmup, args.epochs)
    return {
        name.replace("_optimizer", "_scheduler_by_iteration"): LambdaLR(
            optimizer, lambda step: factor((step + 1) / steps_per_epoch)
        )
        for name, optimizer in optimizers.items()
    }


def lr_factor(schedule: str, warmup: int, epochs: int) -> Callable[[float], float]:
    """The factor of the learning rates after a number of epochs, such as 2.5."""

    def factor(epoch: float) -> float:
        if epoch <= warmup:
            return epoch / warmup
        if schedule == "cosine":
            return 0.5 + 0.5 * math.cos(math.pi * (epoch - warmup) / (epochs - warmup))
        if schedule == "multistep":
            return GAMMA ** sum(epoch > milestone * epochs for milestone in MILESTONES)
        return 1.0

    return factor
