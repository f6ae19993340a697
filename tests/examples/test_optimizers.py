"""Optimizers and the schedules of their learning rates."""

from __future__ import annotations

import cli
import optimizers
import pytest
import torch
from pytorch_metric_learning.losses import ProxyAnchorLoss, TripletMarginLoss


def factors(schedule, warmup, epochs, steps_per_epoch=1):
    factor = optimizers.lr_factor(schedule, warmup, epochs)
    return [factor((step + 1) / steps_per_epoch) for step in range(epochs * steps_per_epoch)]


def test_constant_with_and_without_warmup():
    assert factors("none", 0, 3) == [1, 1, 1]
    assert factors("none", 2, 3, steps_per_epoch=2) == [0.25, 0.5, 0.75, 1, 1, 1]


def test_cosine():
    values = factors("cosine", 0, 10, steps_per_epoch=4)
    assert values[19] == pytest.approx(0.5)
    assert values[-1] == pytest.approx(0)
    assert values == sorted(values, reverse=True)
    assert factors("cosine", 1, 9)[0] == 1


def test_multistep_is_that_of_the_authors():
    values = factors("multistep", 0, 80)
    expected = [1.0] * 15 + [0.3] * 15 + [0.09] * 15 + [0.027] * 35
    assert values == pytest.approx(expected)


def test_each_part_has_its_learning_rate_and_frozen_parts_have_no_optimizer():
    args = cli.parse(["--lr", "3", "--trunk-lr", "2", "--loss-lr", "1", "--weight-decay", "0.5",
                      "--schedule", "cosine"])  # fmt: skip
    models = {"trunk": torch.nn.Linear(2, 2), "embedder": torch.nn.Linear(2, 2)}
    built = optimizers.build_optimizers(args, models, ProxyAnchorLoss(3, 2))
    groups = {name: optimizer.param_groups[0] for name, optimizer in built.items()}
    assert {name: (group["lr"], group["weight_decay"]) for name, group in groups.items()} == {
        "trunk_optimizer": (2, 0.5),
        "embedder_optimizer": (3, 0.5),
        "metric_loss_optimizer": (1, 0),
    }
    schedulers = optimizers.build_schedulers(args, built, 5)
    assert set(schedulers) == {
        f"{name}_scheduler_by_iteration" for name in (*models, "metric_loss")
    }
    models["trunk"].requires_grad_(False)
    built = optimizers.build_optimizers(args, models, TripletMarginLoss())
    assert set(built) == {"embedder_optimizer"}
