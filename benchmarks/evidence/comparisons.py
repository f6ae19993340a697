"""What a claim is tested by: differences between methods, one per seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .conditions import CONDITIONS, Experiment, Scenario
from .methods import MAIN
from .metrics import MAP, RERANKED

CURVE = "curve"  # the metric name for MAP@R on validation classes, by epoch

BySeed = dict[int, Any]
Scores = Callable[[Experiment, str], BySeed]  # raises NotRunError if a seed is missing
Differences = Callable[[Scores], list[float]]


class NotRunError(Exception):
    """A run that a comparison needs is missing."""


@dataclass(frozen=True)
class Comparison:
    """Differences by seed. The claim says that their mean is above the threshold."""

    experiment: Experiment  # of the method that the claim is about
    quantity: str  # what is compared; may be empty if the claim says it
    differences: Differences
    threshold: float = 0.0
    unit: str = "points"  # percentage points; or epochs

    @property
    def title(self) -> str:
        parts = [self.experiment.scenario.title]
        if self.experiment.condition != "clean":
            parts.append(CONDITIONS[self.experiment.condition].label)
        return ", ".join([*parts, self.quantity] if self.quantity else parts)


def subtract(a: BySeed, b: BySeed) -> list[float]:
    return [a[seed] - b[seed] for seed in sorted(a)]


def best_method(
    scores: Scores, experiment: Experiment, methods: Sequence[str], metric: str
) -> Experiment:
    """Of the methods, the one with the highest mean on the test classes: the hardest to beat."""
    candidates = [experiment._replace(method=name) for name in methods]
    return max(candidates, key=lambda e: sum(scores(e, metric).values()))


def difference_to(experiment: Experiment, method: str, metric: str) -> Differences:
    other = experiment._replace(method=method)
    return lambda scores: subtract(scores(experiment, metric), scores(other, metric))


def difference_to_best(experiment: Experiment, others: Sequence[str], metric: str) -> Differences:
    def differences(scores: Scores) -> list[float]:
        other = best_method(scores, experiment, others, metric)
        return subtract(scores(experiment, metric), scores(other, metric))

    return differences


def margin_growth(experiment: Experiment, others: Sequence[str]) -> Differences:
    """The difference to the best other method, minus the same difference on clean labels."""

    def differences(scores: Scores) -> list[float]:
        margin = difference_to_best(experiment, others, MAP)(scores)
        clean = difference_to_best(experiment._replace(condition="clean"), others, MAP)(scores)
        return [a - b for a, b in zip(margin, clean, strict=True)]

    return differences


def half_epochs_margin(experiment: Experiment, others: Sequence[str]) -> Differences:
    """Epochs to the final MAP@R of the best other method: half of its own, minus this method's.

    MAP@R is on validation classes.
    """

    def differences(scores: Scores) -> list[float]:
        other = best_method(scores, experiment, others, MAP)
        curves, other_curves = scores(experiment, CURVE), scores(other, CURVE)
        return [
            epochs_to(other_curve, other_curve[-1]) / 2 - epochs_to(curves[seed], other_curve[-1])
            for seed, other_curve in sorted(other_curves.items())
        ]

    return differences


def epochs_to(curve: Sequence[float], value: float) -> int:
    """The first epoch, from 0, that reaches the value, or the number of epochs if none does."""
    return next((epoch for epoch, v in enumerate(curve) if v >= value), len(curve))


def reranking_gain(scenario: Scenario) -> Differences:
    """The gain in MAP@R, as a mean over the methods."""

    def differences(scores: Scores) -> list[float]:
        experiments = [Experiment(*scenario, name) for name in MAIN]
        gains = [subtract(scores(e, RERANKED), scores(e, MAP)) for e in experiments]
        return [sum(by_method) / len(gains) for by_method in zip(*gains, strict=True)]

    return differences
