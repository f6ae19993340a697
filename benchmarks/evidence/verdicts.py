"""Means, confidence intervals, and the verdicts that follow from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from .comparisons import CURVE, Comparison, NotRunError
from .conditions import Experiment
from .records import Results

HOLDS, DOES_NOT_HOLD, CONTRADICTED = "holds", "does not hold here", "contradicted"
NOT_RUN = "not run"


class Interval(NamedTuple):
    """A mean and the half-width of its 95% interval (Student's t), which is NaN for one value."""

    mean: float
    half_width: float
    count: int

    @property
    def low(self) -> float:
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        return self.mean + self.half_width


def interval(values: Sequence[float]) -> Interval:
    n, mean = len(values), float(np.mean(values))
    if n < 2:
        return Interval(mean, math.nan, n)
    error = float(np.std(values, ddof=1)) / math.sqrt(n)
    return Interval(mean, float(stats.t.ppf(0.975, n - 1)) * error, n)


def verdict(difference: Interval, threshold: float = 0.0) -> str:
    """Whether the whole interval is above the threshold, below it, or neither."""
    if difference.low > threshold:
        return HOLDS
    return CONTRADICTED if difference.high < threshold else DOES_NOT_HOLD


class Judged(NamedTuple):
    comparison: Comparison
    difference: Interval | None
    verdict: str


def judge(comparison: Comparison, results: Results) -> Judged:
    try:
        difference = interval(comparison.differences(ScoresOf(results)))
    except NotRunError:
        return Judged(comparison, None, NOT_RUN)
    return Judged(comparison, difference, verdict(difference, comparison.threshold))


def overall(judged: Sequence[Judged]) -> str:
    """The verdict on a claim, from the comparisons that were run.

    It holds if all comparisons do. It is contradicted if some are contradicted and none holds.
    """
    verdicts = {j.verdict for j in judged}
    run = verdicts - {NOT_RUN}
    if not run:
        return NOT_RUN
    if run == {HOLDS}:
        found = HOLDS
    elif CONTRADICTED in run and HOLDS not in run:
        found = CONTRADICTED
    else:
        found = DOES_NOT_HOLD
    return f"{found} so far" if NOT_RUN in verdicts else found


class ScoresOf:
    """Test scores by seed. Raises NotRunError unless all seeds of the experiment were run."""

    def __init__(self, results: Results) -> None:
        self.results = results

    def __call__(self, experiment: Experiment, metric: str) -> dict[int, Any]:
        if not self.results.is_complete(experiment):
            raise NotRunError(str(experiment))
        runs = self.results.tested(experiment)
        if metric == CURVE:
            return {r["seed"]: curve(r, self.results.preset.budget.epochs) for r in runs}
        return {r["seed"]: r["test"][metric] for r in runs}


def curve(run: dict[str, Any], epochs: int) -> list[float]:
    """MAP@R on validation classes before training and after each epoch; 0 after a divergence."""
    values = [row["map_at_r"] for row in run["history"]]
    return values + [0.0] * (epochs + 1 - len(values))
