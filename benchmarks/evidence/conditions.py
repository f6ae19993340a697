"""Datasets, initializations and training conditions, and what an experiment is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from .methods import COMBINATIONS, MAIN, METHODS


@dataclass(frozen=True)
class Dataset:
    label: str
    source: str  # its name in examples/loaders.py
    classification: bool = False  # the test images are of the training classes
    few_shot: bool = False  # also measure few-shot episodes


DATASETS = {
    "omniglot": Dataset("Omniglot", "omniglot", few_shot=True),
    "cifar100": Dataset("CIFAR-100", "cifar100"),
    "cifar100_classes": Dataset("CIFAR-100, classification", "cifar100", classification=True),
    "digits": Dataset("digits", "digits"),  # needs no files
}
RETRIEVAL_DATASETS = ("omniglot", "cifar100")
INITS = {"scratch": "from scratch", "finetune": "fine-tuned"}


@dataclass(frozen=True)
class Condition:
    label: str
    noise: float = 0.0  # fraction of the training labels made wrong
    withheld: float = 0.0  # fraction of each training class's images left out
    imbalance: float = 1.0  # images of the largest class / images of the smallest class
    tuned_on: str = "clean"  # the condition whose trials choose the hyperparameters


CONDITIONS = {
    "clean": Condition("clean"),
    "noise10": Condition("10% wrong labels", noise=0.1, tuned_on="noise30"),
    "noise30": Condition("30% wrong labels", noise=0.3, tuned_on="noise30"),
    "noise50": Condition("50% wrong labels", noise=0.5, tuned_on="noise30"),
    "withheld50": Condition("50% of the images withheld", withheld=0.5),
    "withheld75": Condition("75% of the images withheld", withheld=0.75),
    "long_tail": Condition("long-tailed classes", imbalance=20.0, tuned_on="long_tail"),
}
NOISE = ("noise10", "noise30", "noise50")
WITHHELD = ("withheld50", "withheld75")


class Scenario(NamedTuple):
    """What an experiment consists of besides the method."""

    dataset: str
    init: str
    condition: str = "clean"

    @property
    def title(self) -> str:
        """Dataset and initialization."""
        return f"{DATASETS[self.dataset].label}, {INITS[self.init]}"

    def under(self, condition: str) -> Scenario:
        return self._replace(condition=condition)


SCENARIOS = tuple(Scenario(dataset, init) for init in INITS for dataset in RETRIEVAL_DATASETS)


class Experiment(NamedTuple):
    """A method in a scenario. The fields are in each result line."""

    dataset: str
    init: str
    condition: str
    method: str

    def __str__(self) -> str:
        return "/".join(self)

    @property
    def scenario(self) -> Scenario:
        return Scenario(self.dataset, self.init, self.condition)

    @property
    def tuned_as(self) -> Experiment:
        """The experiment whose trials choose the hyperparameters."""
        condition = CONDITIONS[self.condition].tuned_on
        return self._replace(condition=condition, method=METHODS[self.method].tuned_as)

    @property
    def is_reranked(self) -> bool:
        """Whether the test measures re-ranking too, which takes longer than the rest of it."""
        if DATASETS[self.dataset].classification:
            return False
        if self.condition == "clean" and self.method in MAIN:
            return True
        return (
            self.init == "scratch"
            and self.condition in ("clean", "noise30")
            and self.method in COMBINATIONS
        )

    @property
    def has_balanced_batches(self) -> bool:
        """Whether a batch holds equally many samples per class.

        In classification and with long-tailed classes batches are random: balanced batches would
        undo the imbalance.
        """
        imbalanced = CONDITIONS[self.condition].imbalance > 1
        classification = DATASETS[self.dataset].classification
        return not imbalanced and not classification
