"""What a method consists of: a search space, and how to build its loss and miner from a draw."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from torch import nn

from pml_extras.distillation import SelfDistillation, SnapshotTeacher
from pml_extras.regularizers import ClassInterferenceRegularizer

optuna.logging.set_verbosity(optuna.logging.WARNING)

Hparams = dict[str, Any]
Space = dict[str, BaseDistribution]


def uniform(low: float, high: float) -> FloatDistribution:
    return FloatDistribution(low, high)


def log_uniform(low: float, high: float) -> FloatDistribution:
    return FloatDistribution(low, high, log=True)


LR: Space = {"lr": log_uniform(3e-4, 1e-2)}  # of the network; Adam


class Sizes(NamedTuple):
    """Sizes of the data and of a batch, which losses, miners and samplers need."""

    num_classes: int
    embedding_size: int
    samples_per_class: int  # in a batch
    batch_size: int


@dataclass
class Components:
    """What a training step needs besides the network."""

    loss: nn.Module
    miner: nn.Module | None = None
    miner_start: float = 0.0  # fraction of the training before which the miner is off
    schedule: Callable[[float], None] | None = None  # called with the fraction of training done


@dataclass(frozen=True)
class Method:
    name: str  # in the result lines
    label: str  # in tables and figures
    space: Space  # searched, besides the learning rate
    build_loss: Callable[[Hparams, Sizes], nn.Module]
    build_miner: Callable[[Hparams, Sizes], nn.Module] | None = None
    schedule: Callable[[Any, Hparams, float], None] | None = None  # (loss, hparams, progress)
    fixed: Hparams = field(default_factory=dict)  # hyperparameters that are not searched
    from_pml: bool = False  # uses nothing of pml_extras
    proxy_based: bool = False  # has a proxy or a center per class
    base: str | None = None  # the method that this one is a variation of
    additions: tuple[str, ...] = ()  # "lsd", "lsd_low_temperature", "cir" or a miner
    batches: Literal["balanced", "square", "random"] = "balanced"
    label_filtered: bool = False  # after each epoch, leave out the label issues found

    @property
    def tuned_as(self) -> str:
        """The method whose trials choose the hyperparameters. Label filtering adds none."""
        return self.base if self.label_filtered and self.base else self.name

    def draw(self, trial: int) -> Hparams:
        """The hyperparameters of a random trial.

        The trial's number is the seed. So methods whose spaces start with the same hyperparameters,
        such as a loss with and without an addition, draw the same values for them.
        """
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=trial))
        return self.fixed | study.ask(LR | self.space).params

    def sizes(self, num_classes: int, embedding_size: int, batch_size: int) -> Sizes:
        """Four samples per class in a batch; more if there are too few classes to fill it."""
        if self.batches == "square":
            side = int(batch_size**0.5)
            return Sizes(num_classes, embedding_size, side, side**2)
        samples_per_class = 4
        while samples_per_class * num_classes < batch_size:
            samples_per_class *= 2
        return Sizes(num_classes, embedding_size, samples_per_class, batch_size)

    def build(
        self, hparams: Hparams, sizes: Sizes, network: nn.Module, num_epochs: int
    ) -> Components:
        """The loss, wrapped as the additions require, the miner and the schedule."""
        loss = self.build_loss(hparams, sizes)
        components = Components(loss, miner_start=hparams.get("miner_start", 0.0))
        if self.build_miner:
            components.miner = self.build_miner(hparams, sizes)
        if self.schedule:
            components.schedule = partial(self.schedule, loss, hparams)
        if "strength" in hparams:
            ClassInterferenceRegularizer(
                sizes.num_classes,
                sizes.embedding_size,
                strength=hparams["strength"],
                normalize=hparams.get("normalize", True),
            ).attach(loss)
        if "alpha_lsd" in hparams:
            components.loss = SelfDistillation(
                loss,
                SnapshotTeacher(network),
                num_epochs,
                alpha=hparams["alpha_lsd"],
                temperature=hparams.get("temperature_lsd", 1.0),
            )
        return components
