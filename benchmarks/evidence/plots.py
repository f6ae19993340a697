"""How the page's figures look: ours in colours, baselines in grey."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from figures import INK
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .plan import FROM_PML, METHODS, OURS

COLORS = dict(zip(OURS, ("#1b6ca8", "#57b0e3", "#c0392b", "#f0932b"), strict=True))


def color_of(method: str) -> str | None:
    """Ours have one each, whatever the batches."""
    return COLORS.get(method.removesuffix("_random"))


def plot_lines(
    axes: Axes,
    lines: dict[str, np.ndarray],
    x: Sequence[float],
    halves: dict[str, np.ndarray] | None = None,
) -> None:
    """Ours in colours, baselines in grey, the one that ends highest in black."""
    rivals = [n for n in lines if n in FROM_PML and not np.isnan(lines[n][-1])]
    best = max(rivals, key=lambda n: lines[n][-1], default=None)
    for name, values in lines.items():
        color, width, label = color_of(name) or "#cfcfcf", 1.8, METHODS[name].label
        if name == best:
            color, label = INK, "best baseline at the end"
        elif not color_of(name):
            width, label = 1.0, "other baselines"
        order = 3 if color_of(name) else 2 if name == best else 1
        axes.plot(x, values, color=color, lw=width, marker=".", label=label, zorder=order)
        if halves and order > 1:
            axes.fill_between(x, values - halves[name], values + halves[name], color=color,
                              alpha=0.12, lw=0, zorder=order)  # fmt: skip
    if best:
        right = float(lines[best][-1]) < float(lines[best][0])  # the corner with nothing in it
        axes.text(
            *(0.98 if right else 0.02, 0.97, f"black: {METHODS[best].label}"),
            ha="right" if right else "left",
            va="top",
            transform=axes.transAxes,
            fontsize=8,
        )


def panelled(
    panels: Sequence[Any], paint: Callable[[Axes, Any], None], y_label: str
) -> Figure | None:
    """Panels in rows of two, with one legend for all."""
    if not panels:
        return None
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure, grid = plt.subplots(
        rows,
        columns,
        figsize=(4.6 * columns + 2.4, 3.5 * rows),
        squeeze=False,
        layout="constrained",
    )
    labels: dict[str, Any] = {}
    for axes, panel in zip(grid.flat, panels, strict=False):
        paint(axes, panel)
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            labels.setdefault(label, handle)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for row in grid:
        row[0].set_ylabel(y_label)
    figure.legend(labels.values(), labels, loc="outside right upper", fontsize=9)
    return figure
