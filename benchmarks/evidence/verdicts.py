"""Means, intervals, and what follows from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from .claims import Comparison, NotRunError
from .plan import Cell
from .records import Results

HOLDS, NOT_HERE, CONTRARY, NOT_RUN = "holds", "does not hold here", "contrary", "not run"


class Interval(NamedTuple):
    """A mean and the half-width of its 95% interval (Student's t); NaN for one value."""

    mean: float
    half: float
    count: int

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half


def interval(values: Sequence[float]) -> Interval:
    n, mean = len(values), float(np.mean(values))
    if n < 2:
        return Interval(mean, math.nan, n)
    error = float(np.std(values, ddof=1)) / math.sqrt(n)
    return Interval(mean, float(stats.t.ppf(0.975, n - 1)) * error, n)


def verdict(found: Interval, threshold: float = 0.0) -> str:
    """Whether the whole interval lies above the threshold, or below it."""
    if found.low > threshold:
        return HOLDS
    return CONTRARY if found.high < threshold else NOT_HERE


class Judged(NamedTuple):
    comparison: Comparison
    difference: Interval | None
    verdict: str


def judge(comparison: Comparison, results: Results) -> Judged:
    try:
        found = interval(comparison.differences(Scored(results)))
    except NotRunError:
        return Judged(comparison, None, NOT_RUN)
    return Judged(comparison, found, verdict(found, comparison.threshold))


def overall(judged: Sequence[Judged]) -> str:
    """Of a claim: it holds if all comparisons do, and is contrary if some are and none holds."""
    run = {j.verdict for j in judged} - {NOT_RUN}
    if not run:
        return NOT_RUN
    found = NOT_HERE
    if run == {HOLDS}:
        found = HOLDS
    elif CONTRARY in run and HOLDS not in run:
        found = CONTRARY
    return found + (" so far" if NOT_RUN in {j.verdict for j in judged} else "")


class Scored:
    """A cell's scores by seed, once all its seeds are run."""

    def __init__(self, results: Results) -> None:
        self.results = results

    def __call__(self, cell: Cell, metric: str) -> dict[int, Any]:
        runs = self.results.tested(cell)
        if len(runs) < self.results.preset.seeds:
            raise NotRunError("/".join(cell))
        if metric == "curve":
            return {r["seed"]: curve(r, self.results.preset.budget.epochs) for r in runs}
        return {r["seed"]: r["test"][metric] for r in runs}


def curve(run: dict[str, Any], epochs: int) -> list[float]:
    """MAP@R on validation classes before the first and after each epoch; 0 after a divergence."""
    values = [row["map_at_r"] for row in run["history"]]
    return values + [0.0] * (epochs + 1 - len(values))
