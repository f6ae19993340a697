"""Intervals against scipy, and comparisons against values computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from benchmarks.evidence import verdicts
from benchmarks.evidence.comparisons import (
    Comparison,
    NotRunError,
    difference_to,
    difference_to_best,
    epochs_to,
    half_epochs_margin,
    margin_growth,
)
from benchmarks.evidence.conditions import Experiment
from benchmarks.evidence.metrics import MAP
from benchmarks.evidence.verdicts import (
    CONTRADICTED,
    DOES_NOT_HOLD,
    HOLDS,
    NOT_RUN,
    Interval,
    interval,
)

EXPERIMENT = Experiment("omniglot", "scratch", "clean", "ours")


def scores(**by_method):
    """Scores of methods by seed. `name_noise` holds those under noise."""

    def look_up(experiment, metric):
        name = experiment.method + ("" if experiment.condition == "clean" else "_noise")
        if name not in by_method:
            raise NotRunError(name)
        return dict(enumerate(by_method[name]))

    return look_up


def test_interval_by_hand():
    found = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    # s = sqrt(2.5), t(0.975, 4) = 2.776445
    assert found.mean == 3
    assert found.half_width == pytest.approx(2.776445 * math.sqrt(2.5 / 5), rel=1e-6)
    assert math.isnan(interval([1.0]).half_width)


def test_intervals_agree_with_scipy():
    generator = np.random.default_rng(0)
    for n in (2, 5, 10):
        a, b = generator.normal(size=(2, n))
        found = interval((a - b).tolist())
        expected = stats.ttest_rel(a, b).confidence_interval(0.95)
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize(
    ("mean", "half_width", "threshold", "expected"),
    [
        (2, 1, 0, HOLDS),
        (2, 3, 0, DOES_NOT_HOLD),
        (-2, 1, 0, CONTRADICTED),
        (-0.2, 0.1, -0.5, HOLDS),
        (0, 0, 0, DOES_NOT_HOLD),
        (2, math.nan, 0, DOES_NOT_HOLD),  # one seed shows nothing
    ],
)
def test_verdicts(mean, half_width, threshold, expected):
    assert verdicts.verdict(Interval(mean, half_width, 5), threshold) == expected


def test_the_best_method_has_the_highest_mean():
    found = difference_to_best(EXPERIMENT, ("weak", "strong"), MAP)(
        scores(ours=[0.5, 0.6], weak=[0.1, 0.9], strong=[0.5, 0.7])
    )
    assert found == pytest.approx([0.0, -0.1])


def test_margin_growth_uses_the_best_method_of_each_condition():
    found = margin_growth(EXPERIMENT._replace(condition="noise30"), ("a", "b"))(
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


def test_half_epochs_margin():
    curves = scores(
        ours=[[0, 5, 9], [0, 1, 2]],  # reaches 4 after one epoch; never
        rival=[[0, 3, 4], [0, 4, 4]],  # reaches its final value after two epochs; after one
    )
    means = scores(ours=[9, 2], rival=[4, 4])
    found = half_epochs_margin(EXPERIMENT, ("rival",))(
        lambda e, metric: (curves if metric == "curve" else means)(e, metric)
    )
    assert found == [2 / 2 - 1, 1 / 2 - 3]
    assert epochs_to([0.1, 0.3, 0.2], 0.25) == 1


def test_a_missing_run_gives_no_difference():
    with pytest.raises(NotRunError):
        difference_to(EXPERIMENT, "absent", MAP)(scores(ours=[1.0]))


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ([HOLDS, HOLDS], HOLDS),
        ([HOLDS, NOT_RUN], f"{HOLDS} so far"),
        ([HOLDS, CONTRADICTED], DOES_NOT_HOLD),
        ([DOES_NOT_HOLD, HOLDS], DOES_NOT_HOLD),
        ([DOES_NOT_HOLD, CONTRADICTED], CONTRADICTED),
        ([DOES_NOT_HOLD, DOES_NOT_HOLD], DOES_NOT_HOLD),
        ([NOT_RUN, NOT_RUN], NOT_RUN),
    ],
)
def test_the_verdict_on_a_claim(kinds, expected):
    values = {HOLDS: [1.0, 1.1], CONTRADICTED: [-1.0, -1.1], DOES_NOT_HOLD: [-1.0, 1.0]}

    def differences(kind):
        def give(scores):
            if kind == NOT_RUN:
                raise NotRunError
            return values[kind]

        return give

    judged = [
        verdicts.judge(Comparison(EXPERIMENT, "", differences(k)), results=None) for k in kinds
    ]
    assert [j.verdict for j in judged] == kinds
    assert verdicts.overall(judged) == expected


def test_the_curve_of_a_diverged_run_ends_in_zeros():
    run = {"history": [{"map_at_r": 0.1}, {"map_at_r": 0.2}]}
    assert verdicts.curve(run, 4) == [0.1, 0.2, 0, 0, 0]
