"""How much is run: budgets, and the experiments of each preset."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from .conditions import INITS, NOISE, RETRIEVAL_DATASETS, WITHHELD, Experiment
from .methods import (
    BASELINES,
    CLASSIFIERS,
    COMBINATIONS,
    LABEL_FILTERED,
    MAIN,
    MINED,
    PROXY_BASED,
    RANDOM_BATCHES,
    SQUARE_BATCHES,
    with_last_addition,
)


class Grid(NamedTuple):
    """All combinations of these."""

    datasets: tuple[str, ...]
    inits: tuple[str, ...]
    conditions: tuple[str, ...]
    methods: tuple[str, ...]

    def experiments(self) -> Iterator[Experiment]:
        for dataset in self.datasets:
            for init in self.inits:
                for condition in self.conditions:
                    for method in self.methods:
                        yield Experiment(dataset, init, condition, method)


class Budget(NamedTuple):
    """The training budget, equal for all methods.

    An epoch is a fixed number of steps, however many images a condition leaves. So conditions
    differ in the data and not in the length of the training.
    """

    epochs: int
    steps_per_epoch: int
    batch_size: int
    width: int  # channels of the convolutions
    pixel_unshuffle: bool  # whether the network starts by folding 2 x 2 pixels into channels
    pretraining_epochs: int
    embedding_size: int = 64


@dataclass(frozen=True)
class Preset:
    budget: Budget
    trials: int  # per method
    seeds: int
    grids: dict[str, Grid]

    def experiments(self, grid: str | None = None) -> list[Experiment]:
        """In the order in which they are run, without duplicates."""
        grids = [self.grids[grid]] if grid else self.grids.values()
        return list(dict.fromkeys(e for grid in grids for e in grid.experiments()))


OMNIGLOT, CIFAR100 = ("omniglot",), ("cifar100",)
SCRATCH, FINETUNE = ("scratch",), ("finetune",)
CLEAN = ("clean",)
CLEAN_AND_NOISE = ("clean", "noise30")
OTHER_BATCHES = (*RANDOM_BATCHES, *SQUARE_BATCHES)
LSD_BASELINES = tuple(name for name, base in with_last_addition("lsd").items() if base in BASELINES)


def claim_grids(
    init: str, noise: tuple[str, ...] = NOISE, withheld: tuple[str, ...] = WITHHELD
) -> dict[str, Grid]:
    """What the claims compare."""
    both, inits = RETRIEVAL_DATASETS, (init,)
    grids = {
        "clean": Grid(both, inits, CLEAN, tuple(MAIN)),
        "few_shot": Grid(OMNIGLOT, inits, CLEAN, ("triplet", "triplet+cir")),
        "classification": Grid(("cifar100_classes",), inits, CLEAN, CLASSIFIERS),
        "long_tail": Grid(OMNIGLOT, inits, ("long_tail",), PROXY_BASED),
        "distillation": Grid(both, inits, CLEAN, LSD_BASELINES),
        "noise": Grid(both, inits, noise, tuple(MAIN)),
        "miner": Grid(both, inits, ("noise30",), MINED),
        "withheld": Grid(both, inits, withheld, tuple(MAIN)),
    }
    return {name if init == "scratch" else f"{name}_{init}": grid for name, grid in grids.items()}


SMALL = Preset(
    Budget(
        epochs=5,
        steps_per_epoch=50,
        batch_size=64,
        width=32,
        pixel_unshuffle=True,
        pretraining_epochs=4,
    ),
    trials=6,
    seeds=5,
    grids=claim_grids("scratch", ("noise30",), ("withheld75",)),
)
LOW_TEMPERATURE_LSD = tuple(with_last_addition("lsd_low_temperature"))
LONG_METHODS = (
    "multi_similarity",
    "supcon",
    "contextual",
    "contextual_warmup",
    *RANDOM_BATCHES,
)

PRESETS = {
    # The claims, at one noise level and one level of withheld images. Each of the first two takes
    # about two hours on two CPU cores.
    "small": SMALL,
    "small-finetuned": replace(SMALL, grids=claim_grids("finetune", ("noise30",), ("withheld75",))),
    # Follow-up questions.
    "small-explored": replace(
        SMALL,
        grids={
            "combinations": Grid(OMNIGLOT, SCRATCH, CLEAN_AND_NOISE, COMBINATIONS),
            "batches": Grid(OMNIGLOT, SCRATCH, CLEAN_AND_NOISE, OTHER_BATCHES),
            "batches_cifar100": Grid(CIFAR100, SCRATCH, CLEAN, tuple(RANDOM_BATCHES)),
            "label_filtered": Grid(
                OMNIGLOT, SCRATCH, ("noise30", "noise50"), tuple(LABEL_FILTERED)
            ),
            "label_filtered_cifar100": Grid(
                CIFAR100, SCRATCH, CLEAN_AND_NOISE, tuple(LABEL_FILTERED)
            ),
            "label_filtered_finetune": Grid(
                RETRIEVAL_DATASETS, FINETUNE, ("noise30",), tuple(LABEL_FILTERED)
            ),
            "noise50": Grid(OMNIGLOT, SCRATCH, ("noise50",), tuple(MAIN)),
            "low_temperature_lsd": Grid(RETRIEVAL_DATASETS, SCRATCH, CLEAN, LOW_TEMPERATURE_LSD),
            "batches_finetune": Grid(RETRIEVAL_DATASETS, FINETUNE, CLEAN, tuple(RANDOM_BATCHES)),
        },
    ),
    # Four times as many steps for the same network.
    "long": Preset(
        SMALL.budget._replace(epochs=10, steps_per_epoch=100),
        trials=6,
        seeds=5,
        grids={"clean": Grid(OMNIGLOT, SCRATCH, CLEAN, LONG_METHODS)},
    ),
    # For a GPU.
    "full": Preset(
        Budget(
            epochs=30,
            steps_per_epoch=100,
            batch_size=128,
            width=64,
            pixel_unshuffle=False,
            pretraining_epochs=20,
        ),
        trials=20,
        seeds=10,
        grids={
            **claim_grids("scratch"),
            **claim_grids("finetune"),
            "combinations": Grid(RETRIEVAL_DATASETS, SCRATCH, CLEAN_AND_NOISE, COMBINATIONS),
            "batches": Grid(RETRIEVAL_DATASETS, tuple(INITS), CLEAN_AND_NOISE, OTHER_BATCHES),
            "label_filtered": Grid(RETRIEVAL_DATASETS, tuple(INITS), NOISE, tuple(LABEL_FILTERED)),
            "low_temperature_lsd": Grid(RETRIEVAL_DATASETS, SCRATCH, CLEAN, LOW_TEMPERATURE_LSD),
        },
    ),
    # One minute and no files, to see that everything works.
    "smoke": Preset(
        Budget(
            epochs=2,
            steps_per_epoch=3,
            batch_size=64,
            width=4,
            pixel_unshuffle=False,
            pretraining_epochs=1,
        ),
        trials=2,
        seeds=2,
        grids={
            "clean": Grid(("digits",), tuple(INITS), CLEAN, ("contrastive", "contextual")),
            "noise": Grid(("digits",), SCRATCH, ("noise30",), ("contrastive", "contextual_warmup")),
        },
    ),
}


def merge_presets(name: str) -> tuple[str, Preset]:
    """All presets with the budget of the named one, merged, and the name of the first.

    Runs of one budget are comparable, so these presets share a file of results and a page.
    """
    same_budget = {n: p for n, p in PRESETS.items() if p.budget == PRESETS[name].budget}
    grids = {key: grid for preset in same_budget.values() for key, grid in preset.grids.items()}
    first = next(iter(same_budget))
    return first, replace(PRESETS[first], grids=grids)
