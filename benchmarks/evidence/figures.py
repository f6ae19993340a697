"""The figures of the page. Our methods are colored, baselines gray, the best baseline black."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .conditions import (
    CONDITIONS,
    DATASETS,
    INITS,
    NOISE,
    RETRIEVAL_DATASETS,
    SCENARIOS,
    WITHHELD,
    Experiment,
    Scenario,
)
from .formatting import mean
from .methods import MAIN, METHODS, OURS, with_last_addition
from .metrics import MAP
from .records import Results
from .verdicts import curve

INK, GRAY, LIGHT = "#222222", "#777777", "#cfcfcf"
COLORS = dict(zip(OURS, ("#1b6ca8", "#57b0e3", "#c0392b", "#f0932b"), strict=True))
STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GRAY,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
    "figure.dpi": 130,
    "savefig.bbox": "tight",
}


def color_of(method: str) -> str | None:
    """A variation has the color of its base. None for baselines."""
    return COLORS.get(method) or COLORS.get(METHODS[method].base or "")


def has_tests(results: Results, scenario: Scenario, methods: Sequence[str]) -> bool:
    return any(results.tested(Experiment(*scenario, name)) for name in methods)


# ---- The figures. Each is None if there are no results for it.


def curves(results: Results) -> Figure | None:
    methods, epochs = results.preset.grids["clean"].methods, results.preset.budget.epochs
    panels = [s for s in SCENARIOS if has_tests(results, s, methods)]

    def draw(axes: Axes, scenario: Scenario) -> None:
        lines = {}
        for name in methods:
            runs = results.tested(Experiment(*scenario, name))
            if runs:
                lines[name] = np.mean([curve(run, epochs) for run in runs], axis=0)
        draw_lines(axes, range(epochs + 1), lines)
        axes.set(title=scenario.title, xlabel="epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)

    return draw_panels(panels, draw, "MAP@R, validation classes")


def conditions(results: Results) -> Figure | None:
    methods = tuple(MAIN)
    panels = [
        (scenario, levels)
        for levels in (NOISE, WITHHELD)
        for scenario in SCENARIOS
        if any(has_tests(results, scenario.under(level), methods) for level in levels)
    ]

    def draw(axes: Axes, panel: tuple[Scenario, tuple[str, ...]]) -> None:
        scenario, levels = panel
        scenarios = [scenario.under(condition) for condition in ("clean", *levels)]
        scenarios = [s for s in scenarios if Experiment(*s, methods[0]) in results.planned]
        x = [100 * (CONDITIONS[s.condition].noise + CONDITIONS[s.condition].withheld)
             for s in scenarios]  # fmt: skip
        lines, half_widths = {}, {}
        for name in methods:
            means = [mean(results, Experiment(*s, name), MAP) for s in scenarios]
            lines[name] = np.array([m.mean if m else np.nan for m in means])
            half_widths[name] = np.array([m.half_width if m else np.nan for m in means])
        draw_lines(axes, x, lines, half_widths)
        label = "wrong training labels, %" if levels is NOISE else "training images withheld, %"
        axes.set(title=scenario.title, xlabel=label, xticks=x, ylim=(0, None))

    return draw_panels(panels, draw, "MAP@R, test classes")


ADDITIONS = {  # title: name of the addition, its weight, a label
    "LSD": ("lsd", "alpha_lsd", "alpha"),
    "CIR": ("cir", "strength", "strength"),
}


def additions(results: Results) -> Figure | None:
    tried = {experiment.method for experiment in results.trials}
    variations = {title: with_last_addition(name) for title, (name, *_) in ADDITIONS.items()}
    panels = [title for title in ADDITIONS if variations[title].keys() & tried]

    def changes(e: Experiment, base: str, weight: str) -> list[tuple[float, float]]:
        """The weight, and the change in percent, of each trial that has a pair."""
        with_addition = results.trials.get(e, {})
        without = results.trials.get(e._replace(method=base), {})
        return [
            (record["hparams"][weight], 100 * (record["validation"] / before - 1))
            for trial, record in with_addition.items()
            if trial in without and (before := without[trial]["validation"]) > 0
        ]

    def draw(axes: Axes, title: str) -> None:
        _, weight, label = ADDITIONS[title]
        for dataset, color in zip(DATASETS, COLORS.values(), strict=True):
            for init, marker in zip(INITS, "ox", strict=True):
                scenario = Scenario(dataset, init)
                points = [
                    point
                    for name, base in variations[title].items()
                    for point in changes(Experiment(*scenario, name), base, weight)
                ]
                if points:
                    axes.plot(*np.transpose(points), marker, color=color, ms=4, alpha=0.7,
                              label=scenario.title)  # fmt: skip
        axes.axhline(0, color=GRAY, lw=1)
        axes.set(title=title, xlabel=label)
        axes.set_xscale("log" if title == "LSD" else "linear")
        axes.set_yscale("symlog", linthresh=10)
        axes.set_yticks((-90, -50, -20, -10, 0, 10, 20, 50), minor=False)
        axes.yaxis.set_major_formatter("{x:g}")

    return draw_panels(panels, draw, "change in validation score, %")


def cost(results: Results) -> Figure | None:
    methods = results.preset.grids["clean"].methods
    scenarios = [Scenario(dataset, "scratch") for dataset in RETRIEVAL_DATASETS]
    panels = [s for s in scenarios if has_tests(results, s, methods)]

    def draw(axes: Axes, scenario: Scenario) -> None:
        for number, name in enumerate(methods, 1):
            runs = results.tested(Experiment(*scenario, name))
            seconds = [run["seconds_per_step"] for run in runs if run.get("seconds_per_step")]
            if not seconds:
                continue
            x = 1000 * float(np.median(seconds))
            y = float(np.mean([run["test"][MAP] for run in runs]))
            color, label = color_of(name) or GRAY, f"{number}  {METHODS[name].label}"
            axes.plot(x, y, "o", color=color, markersize=5, label=label)
            axes.annotate(str(number), (x, y), (4, 3), textcoords="offset points", color=color,
                          fontsize=9)  # fmt: skip
        axes.margins(0.1)
        axes.set(title=DATASETS[scenario.dataset].label, xlabel="ms per step", xlim=(0, None))
        axes.set_ylim(bottom=0)

    return draw_panels(panels, draw, "MAP@R, test classes")


FIGURES: dict[str, tuple[Callable[[Results], Figure | None], str]] = {  # with captions
    "curves": (curves, "MAP@R on validation classes during training. Mean over the seeds."),
    "conditions": (
        conditions,
        "MAP@R on test classes, by fraction of wrong labels and of withheld images. 95% intervals.",
    ),
    "additions": (
        additions,
        "Change in the validation score of a trial by an addition, against its weight.",
    ),
    "cost": (cost, "MAP@R on test classes against the time of a training step. From scratch."),
}


def save_figure(results: Results, name: str, folder: Path) -> str:
    """Draw a figure into the folder. Returns the Markdown that shows it, or "" if it is None."""
    function, caption = FIGURES[name]
    path = folder / f"{name}.png"
    with plt.rc_context(STYLE):
        figure = function(results)
        if figure is None:
            path.unlink(missing_ok=True)
            return ""
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
        plt.close(figure)
    return f"![{caption}]({folder.name}/{path.name})\n\n*{caption}*"


# ---- Drawing.


def draw_lines(
    axes: Axes,
    x: Sequence[float],
    lines: Mapping[str, np.ndarray],
    half_widths: Mapping[str, np.ndarray] | None = None,
) -> None:
    """A line per method. The baseline with the highest end is black."""
    rivals = [n for n in lines if METHODS[n].from_pml and not np.isnan(lines[n][-1])]
    best = max(rivals, key=lambda name: lines[name][-1], default=None)
    for name, y in lines.items():
        if name == best:
            color, width, label, order = INK, 1.8, "best baseline at the end", 2
        elif color_of(name):
            color, width, label, order = color_of(name), 1.8, METHODS[name].label, 3
        else:
            color, width, label, order = LIGHT, 1.0, "other baselines", 1
        axes.plot(x, y, color=color, lw=width, marker=".", label=label, zorder=order)
        if half_widths and order > 1:
            axes.fill_between(x, y - half_widths[name], y + half_widths[name], color=color,
                              alpha=0.12, lw=0, zorder=order)  # fmt: skip
    if best:
        falls = float(lines[best][-1]) < float(lines[best][0])
        x_text, align = (0.98, "right") if falls else (0.02, "left")  # the empty corner
        text = f"black: {METHODS[best].label}"
        axes.text(x_text, 0.97, text, ha=align, va="top", transform=axes.transAxes, fontsize=8)


def draw_panels(
    panels: Sequence[Any], draw: Callable[[Axes, Any], None], y_label: str
) -> Figure | None:
    """Panels in rows of two, with one legend. None if there are no panels."""
    if not panels:
        return None
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    size = (4.6 * columns + 2.4, 3.5 * rows)
    figure, grid = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    labels: dict[str, Any] = {}
    for axes, panel in zip(grid.flat, panels, strict=False):
        draw(axes, panel)
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            labels.setdefault(label, handle)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for row in grid:
        row[0].set_ylabel(y_label)
    figure.legend(labels.values(), labels, loc="outside right upper", fontsize=9)
    return figure
