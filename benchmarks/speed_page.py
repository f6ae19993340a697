"""Renders docs/speed.md from the measurements of benchmarks/speed.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"
# By plot: the prefix of case names that end in a number, what the number counts, and the title.
PLOTS = {
    "contextual": ("contextual-", "samples in a batch", "ContextualLoss"),
    "centers": ("centers-", "classes", "CenterContrastiveLoss"),
    "miner": ("miner-", "samples in a batch", "ContextualSimilarityMiner"),
}


def render(results: Path) -> None:
    """Write docs/speed.md and its plots from the JSON files in a folder."""
    runs = {path.stem: json.loads(path.read_text()) for path in sorted(results.glob("*.json"))}
    lines = [
        "# Speed and memory",
        "",
        "Measured by `python benchmarks/speed.py`, which also renders this page.",
        "",
        "- **time** and **memory** are ratios of pml_extras to the contender in column *against*.",
        "  Below 1, pml_extras is faster or smaller. The contenders take turns in one run. A step",
        "  is forward and backward.",
        "- **ms** is the median time of a pml_extras step. **spread** is the interquartile range",
        "  of these times, relative to the median.",
        "- **MiB** is the memory of pml_extras beyond the inputs.",
        "- *plain* is a direct implementation of the formulas: plain autograd in",
        '  `benchmarks/reference.py`, or `implementation="reference"` for ContextualLoss.',
        "  *compiled* is pml_extras under `torch.compile`, where ContextualLoss is plain.",
        "",
        "Short steps are repeated for a tenth of a second in each turn, because one step after",
        "other work is slower (cold caches). The machine was busier in some rows than in others:",
        "compare milliseconds only within a row.",
    ]
    for stem, run in runs.items():
        lines += ["", f"## {run['machine']}", "", run["versions"], ""]
        for name, (prefix, xlabel, title) in PLOTS.items():
            file = DOCS / "figures" / f"speed-{name}-{stem}.svg"
            if plot(run, prefix, xlabel, file):
                caption = f"{title}, {run['machine']}"
                lines += [f"![{caption}](figures/{file.name})", "", f"*{caption}*", ""]
        lines += [
            "| | ms | spread | MiB | against | time | memory |",
            "| --- | --: | --: | --: | --- | --: | --: |",
        ]
        for case in run["cases"].values():
            ours = case["contenders"]["pml_extras"]
            low, high = ours["middle_half_ms"]
            spread = f"{(high - low) / ours['median_ms']:.0%}" if ours["turns"] > 1 else ""
            mib = "" if ours["extra_mib"] is None else f"{ours['extra_mib']:.0f}"
            row = f"| {case['what']} | {ours['median_ms']:.1f} | {spread} | {mib} "
            others = [(n, c) for n, c in case["contenders"].items() if n != "pml_extras"]
            for other, theirs in others:
                time_ratio = ours["median_ms"] / theirs["median_ms"]
                our_mib, their_mib = ours["extra_mib"] or 0, theirs["extra_mib"] or 0
                # A few MiB depend on the allocator more than on the method.
                has_ratio = min(our_mib, their_mib) > 4
                memory_ratio = f"{our_mib / their_mib:.2f}" if has_ratio else ""
                digits = 2 if time_ratio >= 0.1 else 3
                lines.append(f"{row}| {other} | {time_ratio:.{digits}f} | {memory_ratio} |")
                row = "| | | | "
            if not others:
                lines.append(f"{row}| | | |")
    (DOCS / "speed.md").write_text("\n".join(lines) + "\n")


def plot(run: dict[str, Any], prefix: str, xlabel: str, file: Path) -> bool:
    """Plot time and memory over size, log-log. Returns False if no case has the prefix."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    points: dict[str, dict[int, dict[str, Any]]] = {}
    for name, case in run["cases"].items():
        size = name.removeprefix(prefix)
        if name.startswith(prefix) and size.isdigit() and len(case["contenders"]) > 1:
            for contender, measurement in case["contenders"].items():
                points.setdefault(contender, {})[int(size)] = measurement
    if not points:
        return False
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for axes, key, ylabel in zip(
        figure.subplots(1, 2), ("median_ms", "extra_mib"), ("ms per step", "MiB beyond the inputs"),
        strict=True,
    ):  # fmt: skip
        for contender, by_size in points.items():
            style = {"linewidth": 2.5, "zorder": 3} if contender == "pml_extras" else {}
            # Less than 1 MiB cannot be measured reliably.
            values = {
                n: m[key] for n, m in sorted(by_size.items()) if m[key] > 1 or key != "extra_mib"
            }
            axes.loglog(list(values), list(values.values()), marker="o", label=contender, **style)
        sizes = sorted(set().union(*points.values()))
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        axes.grid(color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    # No date and no random ids, so that the same measurements give the same file.
    with rc_context({"svg.hashsalt": file.stem}):
        figure.savefig(file, metadata={"Date": None})
    return True
