"""Results as text: values with intervals, columns and Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from .comparisons import NotRunError, subtract
from .conditions import Experiment, Scenario
from .methods import METHODS
from .metrics import MAP
from .records import Results
from .verdicts import NOT_RUN, Interval, ScoresOf, interval


def markdown_table(
    header: Iterable[str],
    rows: Iterable[Iterable[str]],
    align: Literal["left", "right"] = "right",
) -> str:
    """The first column is always left-aligned."""
    header = list(header)
    rule = ["---", *["--:" if align == "right" else "---"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, rule, *map(list, rows)])


def mean(results: Results, experiment: Experiment, metric: str) -> Interval | None:
    runs = results.tested(experiment)
    return interval([run["test"][metric] for run in runs]) if runs else None


def percent(value: Interval | None, seeds: int) -> str:
    if value is None:
        return NOT_RUN
    text = f"{100 * value.mean:.1f}"
    if value.count > 1:
        text += f" ± {100 * value.half_width:.1f}"
    if value.count < seeds:
        text += f" ({value.count} of {seeds})"
    return text


def mean_percent(results: Results, experiment: Experiment, metric: str) -> str:
    """Empty if the experiment is not planned."""
    if experiment not in results.planned:
        return ""
    return percent(mean(results, experiment, metric), results.preset.seeds)


def signed(difference: Interval, unit: str = "points") -> str:
    factor = 1 if unit == "epochs" else 100
    return f"{factor * difference.mean:+.1f} ± {factor * difference.half_width:.1f}"


def difference(
    results: Results, a: Experiment, b: Experiment, metric: str, metric_b: str | None = None
) -> str:
    """a - b, paired by seed."""
    scores = ScoresOf(results)
    try:
        return signed(interval(subtract(scores(a, metric), scores(b, metric_b or metric))))
    except NotRunError:
        return NOT_RUN


def column(results: Results, experiments: Sequence[Experiment], metric: str) -> list[str]:
    """One text per experiment: the best is bold, and those not significantly below it italic."""
    scores = ScoresOf(results)
    means = {
        e: mean(results, e, metric)
        for e in experiments
        if e in results.planned and results.is_complete(e) and results.preset.seeds > 1
    }
    best = max(means, key=lambda e: means[e].mean, default=None)  # type: ignore[union-attr]
    texts = []
    for e in experiments:
        text = mean_percent(results, e, metric)
        if e == best:
            text = f"**{text}**"
        elif e in means and best is not None:
            gap = interval(subtract(scores(best, metric), scores(e, metric)))
            text = f"*{text}*" if gap.low <= 0 else text
        texts.append(text)
    return texts


def method_table(
    results: Results, methods: Iterable[str], columns: Mapping[str, tuple[Scenario, str]]
) -> str:
    """A row per planned method; empty if there is none. A column is a scenario and a metric."""
    scenarios = [scenario for scenario, _ in columns.values()]
    names = [n for n in methods if any(Experiment(*s, n) in results.planned for s in scenarios)]
    texts = [
        column(results, [Experiment(*scenario, name) for name in names], metric)
        for scenario, metric in columns.values()
    ]
    labels = [METHODS[name].label for name in names]
    return markdown_table(["", *columns], zip(labels, *texts, strict=True)) if names else ""


def paired_table(
    results: Results, variations: Mapping[str, str], title: str, columns: Mapping[str, Scenario]
) -> str:
    """MAP@R of methods, of a variation of each, and the differences.

    Leaves out columns for which no variation is planned. Empty if there are no others.
    """
    columns = {
        head: scenario
        for head, scenario in columns.items()
        if any(Experiment(*scenario, name) in results.planned for name in variations)
    }
    rows = []
    for variation, base in variations.items():
        row = [METHODS[base].label]
        for scenario in columns.values():
            pair = [Experiment(*scenario, base), Experiment(*scenario, variation)]
            row += [mean_percent(results, e, MAP) for e in pair]
            both = results.planned.issuperset(pair)
            row.append(difference(results, pair[1], pair[0], MAP) if both else "")
        rows.append(row)
    header = ["", *(text for head in columns for text in (head, title, "difference"))]
    return markdown_table(header, rows) if columns else ""
