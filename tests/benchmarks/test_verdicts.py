"""Intervals against scipy, and the comparisons on values small enough to work out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from benchmarks.evidence import verdicts
from benchmarks.evidence.claims import (
    Comparison,
    NotRunError,
    above_best,
    epochs_to,
    grows,
    in_half_the_epochs,
    with_and_without,
)
from benchmarks.evidence.plan import MAP, Cell
from benchmarks.evidence.verdicts import CONTRARY, HOLDS, NOT_HERE, NOT_RUN, Interval, interval

CELL = Cell("omniglot", "scratch", "clean", "ours")


def scores(**by_method):
    """Scores of methods by seed; of `name_noise` under noise."""

    def look_up(cell, metric):
        name = cell.method + ("" if cell.condition == "clean" else "_noise")
        if name not in by_method:
            raise NotRunError(name)
        return dict(enumerate(by_method[name]))

    return look_up


def test_an_interval_by_hand():
    found = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    # s = sqrt(2.5), t(0.975, 4) = 2.776445
    assert found.mean == 3
    assert found.half == pytest.approx(2.776445 * math.sqrt(2.5 / 5), rel=1e-6)
    assert math.isnan(interval([1.0]).half)


def test_intervals_agree_with_scipy():
    generator = np.random.default_rng(0)
    for n in (2, 5, 10):
        a, b = generator.normal(size=(2, n))
        found = interval((a - b).tolist())
        expected = stats.ttest_rel(a, b).confidence_interval(0.95)
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize(
    ("mean", "half", "threshold", "expected"),
    [
        (2, 1, 0, HOLDS),
        (2, 3, 0, NOT_HERE),
        (-2, 1, 0, CONTRARY),
        (-0.2, 0.1, -0.5, HOLDS),
        (0, 0, 0, NOT_HERE),
        (2, math.nan, 0, NOT_HERE),  # one seed tells nothing
    ],
)
def test_verdicts(mean, half, threshold, expected):
    assert verdicts.verdict(Interval(mean, half, 5), threshold) == expected


def test_the_best_is_the_one_with_the_highest_mean():
    found = above_best(CELL, ("weak", "strong"), MAP)(
        scores(ours=[0.5, 0.6], weak=[0.1, 0.9], strong=[0.5, 0.7])
    )
    assert found == pytest.approx([0.0, -0.1])


def test_growth_is_of_the_margin_over_the_best_of_each_condition():
    found = grows(CELL._replace(condition="noise30"), ("a", "b"))(
        scores(
            ours=[0.5, 0.5],
            a=[0.6, 0.5],
            b=[0.1, 0.1],
            ours_noise=[0.4, 0.3],
            a_noise=[0.1, 0.1],
            b_noise=[0.2, 0.2],
        )
    )
    assert found == pytest.approx([0.2 + 0.1, 0.1 + 0.0])


def test_half_the_epochs():
    curves = scores(
        ours=[[0, 5, 9], [0, 1, 2]],  # reaches 4 after one epoch; never
        rival=[[0, 3, 4], [0, 4, 4]],  # reaches its own last value after two; after one
    )
    means = scores(ours=[9, 2], rival=[4, 4])
    found = in_half_the_epochs(CELL, ("rival",))(
        lambda cell, metric: (curves if metric == "curve" else means)(cell, metric)
    )
    assert found == [2 / 2 - 1, 1 / 2 - 3]
    assert epochs_to([0.1, 0.3, 0.2], 0.25) == 1


def test_a_missing_run_is_no_difference():
    with pytest.raises(NotRunError):
        with_and_without(CELL, "absent", MAP)(scores(ours=[1.0]))


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ([HOLDS, HOLDS], HOLDS),
        ([HOLDS, NOT_RUN], f"{HOLDS} so far"),
        ([HOLDS, CONTRARY], NOT_HERE),
        ([NOT_HERE, HOLDS], NOT_HERE),
        ([NOT_HERE, CONTRARY], CONTRARY),
        ([NOT_HERE, NOT_HERE], NOT_HERE),
        ([NOT_RUN, NOT_RUN], NOT_RUN),
    ],
)
def test_a_claim_from_its_comparisons(kinds, expected):
    values = {HOLDS: [1.0, 1.1], CONTRARY: [-1.0, -1.1], NOT_HERE: [-1.0, 1.0]}

    def differences(kind):
        def give(scores):
            if kind == NOT_RUN:
                raise NotRunError
            return values[kind]

        return give

    judged = [verdicts.judge(Comparison(CELL, "", differences(k)), results=None) for k in kinds]
    assert [j.verdict for j in judged] == kinds
    assert verdicts.overall(judged) == expected


def test_a_diverged_run_never_arrives():
    run = {"history": [{"map_at_r": 0.1}, {"map_at_r": 0.2}]}
    assert verdicts.curve(run, 4) == [0.1, 0.2, 0, 0, 0]
