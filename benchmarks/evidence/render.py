#!/usr/bin/env python3
"""Tables and figures from the result lines: docs/evidence.md and docs/evidence/*.png.

    python -m benchmarks.evidence.render                  # the largest preset that has results
    python -m benchmarks.evidence.render --preset small    # and what shares its budget

Everything on the page comes from the plan and the lines, but for results/notes-PRESET.md: what we
make of it, which is put at the top if there is such a file. What was not run is said to be so.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal

import matplotlib.pyplot as plt
import numpy as np
from datasets import UserError
from figures import MUTED, STYLE
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from optuna.distributions import BaseDistribution, FloatDistribution

from . import labels, protocol
from .claims import Claim, NotRunError, claims, minus
from .plan import (
    ACCURACY,
    BASELINES,
    BOTH,
    CLASSIFIERS,
    CLEANED,
    COMBINATIONS,
    CONDITIONS,
    DATASETS,
    FEW_SHOT,
    FROM_PML,
    LR,
    MAIN,
    MAP,
    METHODS,
    MINED,
    NOISE,
    P1,
    PRESETS,
    PROXY_BASED,
    RARE,
    RERANKED,
    SHARP,
    SQUARED,
    STARTS,
    WITHHELD,
    Cell,
    whole,
)
from .plots import COLORS, color_of, panelled, plot_lines
from .records import Record, Results, read
from .run import RESULTS
from .verdicts import (
    CONTRARY,
    HOLDS,
    NOT_HERE,
    NOT_RUN,
    Interval,
    Judged,
    Scored,
    curve,
    interval,
    judge,
    overall,
)

DOCS = Path(__file__).parents[2] / "docs"
SIGNS = {HOLDS: "✓", CONTRARY: "✗", NOT_HERE: "–", NOT_RUN: ""}


class Page:
    """The parts of the page, each of which takes what results there are."""

    def __init__(self, results: Results, figures: Path) -> None:
        self.results, self.preset, self.figures = results, results.preset, figures
        self.scores = Scored(results)
        self.planned = set(results.preset.cells())
        self.main = results.preset.blocks["clean"].methods

    # ---- What was measured, in cells of tables.

    def measured(self, cell: Cell, metric: str) -> Interval | None:
        runs = self.results.tested(cell)
        return interval([run["test"][metric] for run in runs]) if runs else None

    def difference(self, a: Cell, b: Cell, metric: str, metric_b: str | None = None) -> str:
        """a - b, paired by seed."""
        try:
            found = minus(self.scores(a, metric), self.scores(b, metric_b or metric))
        except NotRunError:
            return NOT_RUN
        return signed(interval(found))

    def column(self, cells: Sequence[Cell], metric: str) -> list[str]:
        """One figure a cell; the best is bold, and what its seeds do not tell from it is italic."""
        found = [self.measured(cell, metric) if cell in self.planned else None for cell in cells]
        whole = [
            i for i, f in enumerate(found) if f and f.count == self.preset.seeds and f.count > 1
        ]
        best = max(whole, key=lambda i: found[i].mean, default=None)  # type: ignore[union-attr]
        texts = []
        for i, (cell, f) in enumerate(zip(cells, found, strict=True)):
            text = self.text(f) if cell in self.planned else ""
            if i == best:
                text = f"**{text}**"
            elif i in whole and best is not None:
                gap = minus(self.scores(cells[best], metric), self.scores(cell, metric))
                text = f"*{text}*" if interval(gap).low <= 0 else text
            texts.append(text)
        return texts

    def text(self, found: Interval | None) -> str:
        if found is None:
            return NOT_RUN
        text = f"{100 * found.mean:.1f}"
        if found.count > 1:
            text += f" ± {100 * found.half:.1f}"
        if found.count < self.preset.seeds:
            text += f" ({found.count} of {self.preset.seeds})"
        return text

    def grid(
        self, rows: Iterable[str], columns: dict[str, tuple[Callable[[str], Cell], str]]
    ) -> str:
        """A table of methods, with columns given by a cell for each method and a metric."""
        names = [name for name in rows if any(c(name) in self.planned for c, _ in columns.values())]
        found = [self.column([c(name) for name in names], m) for c, m in columns.values()]
        body = [
            [METHODS[name].label, *(column[i] for column in found)] for i, name in enumerate(names)
        ]
        return table(["", *columns], body)

    def by_start(self, part: Callable[[str], str]) -> str:
        """What there is to say of each start, if the plan has any of it."""
        found = {title: part(start) for start, title in STARTS.items()}
        return "\n\n".join(f"### {title.capitalize()}\n\n{f}" for title, f in found.items() if f)

    # ---- The parts.

    def claims(self) -> str:
        head, details, total = [], [], 0
        for claim in claims(self.preset):
            judged = [judge(comparison, self.results) for comparison in claim.comparisons]
            total += len(judged)
            found = [[j for j in judged if j.comparison.cell.start == start] for start in STARTS]
            verdicts = [f"**{overall(js)}**: {count(js)}" if js else "" for js in found]
            head.append([claim.text, source(claim), claim.test, *verdicts])
            details += [f"\n*{claim.text}*\n", comparisons(judged)]
        return "\n".join(
            [
                table(["claim", "source", "test", *STARTS.values()], head, of="words"),
                f"\n{SIGNS[HOLDS]} the 95% interval of the difference, paired by seed, lies above"
                f" the threshold; {SIGNS[CONTRARY]} below it; {SIGNS[NOT_HERE]} neither. “The best"
                " baseline” is the one with the highest mean on the test classes, which is the"
                " hardest to beat. A claim holds if all its comparisons do, and is contrary if"
                f" some are and none holds. The intervals are each its own: of {total} about"
                f" {0.05 * total:.0f} miss what they are to cover.\n\n### Each comparison",
                *details,
            ]
        )

    def clean(self) -> str:
        parts = []
        for dataset, start in PLACES:
            cells = [Cell(dataset, start, "clean", name) for name in self.main]
            cells = [cell for cell in cells if cell in self.planned]
            if not cells:
                continue
            columns = [self.column(cells, metric) for metric in (P1, "r_precision", MAP)] + [
                [self.cost(cell, "seconds_per_step", 1000) for cell in cells]
            ]
            columns.append([self.cost(cell, "peak_mib", 1) for cell in cells])
            names = [METHODS[cell.method].label for cell in cells]
            body = zip(names, *columns, strict=True)
            parts += [
                f"### {place(dataset, start)}\n",
                table(["", "R@1", "R-precision", "MAP@R", "ms a step", "MiB a step"], body),
                "",
            ]
        parts += [
            "A step's time is that of the processor, or of the GPU if there is one; its memory is"
            " what the first epoch needs beyond data and network. Medians over the seeds.",
            self.draw("curves", self.curves),
            self.draw("cost", self.costs),
        ]
        return "\n".join(parts)

    def cost(self, cell: Cell, name: str, factor: float) -> str:
        values = [r[name] for r in self.results.tested(cell) if r.get(name)]
        return f"{factor * float(np.median(values)):.0f}" if values else ""

    def conditions(self) -> str:
        parts = []
        for dataset, start in PLACES:
            shown = {}
            for condition in ("clean", *NOISE, *WITHHELD):
                cell_of = at(dataset, condition, start)
                if cell_of(MAIN[0]) in self.planned:
                    shown[CONDITIONS[condition].label] = (cell_of, MAP)
            if len(shown) > 1:
                parts += [f"### {place(dataset, start)}\n", self.grid(MAIN, shown), ""]
        return "\n".join([*parts, self.draw("conditions", self.robustness)])

    def long_tail(self) -> str:
        columns = {
            f"{title}, {alphabets}": (at("omniglot", "long_tail", start), metric)
            for start, title in STARTS.items()
            for alphabets, metric in (("all alphabets", MAP), ("rare ones", RARE))
        }
        return self.grid(PROXY_BASED, columns)

    def distillation(self) -> str:
        def paired(names: Sequence[str], more: str, start: str) -> str:
            columns = {DATASETS[dataset].label: at(dataset, start=start) for dataset in BOTH}
            return self.paired({name: f"{name}{more}" for name in names}, "+ LSD", columns)

        return "\n\n".join(
            [
                self.by_start(lambda start: paired(tuple(BASELINES), "+lsd", start)),
                "### From scratch, at lower temperatures",
                "The temperature is chosen with alpha.",
                paired(SHARP, "+lsd_sharp", "scratch"),
            ]
        )

    def batches(self) -> str:
        def paired(start: str) -> str:
            conditions = everywhere(("clean", "noise30"), start)
            kinds = {"random": PROXY_BASED, "square": SQUARED}
            found = [
                self.paired({name: f"{name}_{kind}" for name in names}, kind, conditions)
                for kind, names in kinds.items()
            ]
            return "\n\n".join(filter(None, found))

        return self.by_start(paired)

    def cleaned(self) -> str:
        names = {name.removesuffix("_cleaned"): name for name in CLEANED}
        return self.by_start(
            lambda start: self.paired(names, "cleaned", everywhere(("clean", *NOISE), start))
        )

    def paired(
        self, names: dict[str, str], title: str, columns: dict[str, Callable[[str], Cell]]
    ) -> str:
        """MAP@R of methods, of others beside them, and the differences."""
        body, planned = [], self.planned
        columns = {k: c for k, c in columns.items() if any(c(n) in planned for n in names.values())}
        for without, with_it in names.items():
            row = [METHODS[without].label]
            for cell_of in columns.values():
                cells = [cell_of(without), cell_of(with_it)]
                row += [self.text(self.measured(c, MAP)) if c in planned else "" for c in cells]
                whole = planned.issuperset(cells)
                row.append(self.difference(cells[1], cells[0], MAP) if whole else "")
            body.append(row)
        heads = ["", *(h for name in columns for h in (name, title, "difference"))]
        return table(heads, body) if columns else ""

    def few_shot(self) -> str:
        columns = {
            f"{title}, {episode}": (at("omniglot", start=start), episode)
            for start, title in STARTS.items()
            for episode in FEW_SHOT
        }
        return self.grid(("triplet", "triplet+cir"), columns)

    def classes(self) -> str:
        columns = {
            title: (at("cifar100_classes", start=start), ACCURACY)
            for start, title in STARTS.items()
        }
        return self.grid(CLASSIFIERS, columns)

    def miner(self) -> str:
        columns = {place(*where): (at(where[0], "noise30", where[1]), MAP) for where in PLACES}
        return self.grid(("contrastive", "triplet", *MINED), columns)

    def reranking(self, start: str) -> str:
        body = []
        for name in MAIN:
            row = [METHODS[name].label]
            for dataset in BOTH:
                cell = Cell(dataset, start, "clean", name)
                row += [self.text(self.measured(cell, metric)) for metric in (MAP, RERANKED)]
                row.append(self.difference(cell, cell, RERANKED, MAP))
                row.append(self.difference(cell, cell, f"reranked_{P1}", P1))
            body.append(row)
        heads = [
            h
            for d in BOTH
            for h in (f"{DATASETS[d].label} MAP@R", "re-ranked", "difference", "of R@1")
        ]
        return table(["", *heads], body)

    def combinations(self) -> str:
        columns = {
            f"{CONDITIONS[condition].label}{more}": (at("omniglot", condition), metric)
            for condition in ("clean", "noise30")
            for more, metric in (("", MAP), (", re-ranked", RERANKED))
        }
        names = [n for n in COMBINATIONS if self.results.tested(at("omniglot")(n))]
        return self.grid(names or COMBINATIONS, columns)

    def recipes(self) -> str:
        """The best of ours on validation classes, against the best of PML's on test classes, in
        whatever batches."""
        body = []
        for dataset, start in PLACES:
            for condition in ("clean", "noise30"):
                where = at(dataset, condition, start)
                ours = [n for n in METHODS if n not in FROM_PML and where(n) in self.planned]
                ours = [n for n in ours if self.complete(where(n))]
                rivals = [n for n in FROM_PML if self.complete(where(n))]
                if not ours or not set(BASELINES).issubset(rivals):
                    continue
                pick = max(ours, key=lambda n: self.validation(where(n)))
                rival = max(rivals, key=lambda n: self.measured(where(n), MAP).mean)  # type: ignore[union-attr]
                body.append(
                    [
                        f"{place(dataset, start)}, {CONDITIONS[condition].label}",
                        METHODS[pick].label,
                        self.text(self.measured(where(pick), MAP)),
                        METHODS[rival].label,
                        self.text(self.measured(where(rival), MAP)),
                        self.difference(where(pick), where(rival), MAP),
                        self.difference(where(pick), where(rival), RERANKED, MAP)
                        if where(pick).reranked
                        else "",
                    ]
                )
        heads = ["", "best of ours by validation", "MAP@R", "best of PML's", "MAP@R", "difference"]
        heads.append("if ours is re-ranked")
        return table(heads, body, of="words") if body else NOT_RUN

    def complete(self, cell: Cell) -> bool:
        return len(self.results.tested(cell)) == self.preset.seeds

    def validation(self, cell: Cell) -> float:
        return float(np.mean([run["validation"] for run in self.results.tested(cell)]))

    def mechanisms(self) -> str:
        """What the probes saw after the last epoch."""
        heads = {
            "purity": "purity of neighbours",
            "trusted_right": "right labels trusted",
            "trusted_wrong": "wrong labels trusted",
            "neighborhood_size": "neighbourhood",
            "mean_cosine": "mean cosine",
            "center_turn": "centers' turn",
            "teacher_entropy": "teacher's entropy",
        }
        parts = []
        for title, cell_of in everywhere(("clean", "noise30"), "scratch").items():
            body = []
            for name in METHODS:
                runs = self.results.tested(cell_of(name))
                last = [r["history"][-1]["probes"] for r in runs if r["history"]]
                if last:
                    body.append([METHODS[name].label, *(mean_probe(last, key) for key in heads)])
            if body:
                parts += [f"### {title}\n", table(["", *heads.values()], body), ""]
        return "\n".join(parts) or NOT_RUN

    def spaces(self) -> str:
        body = [
            [method.label, ", ".join(f"`{k}` {span(d)}" for k, d in method.space.items())]
            for name, method in METHODS.items()
            if any(cell.method == name for cell in self.planned)
        ]
        return table(["", f"`lr` {span(LR['lr'])}, and"], body, of="words")

    # ---- Figures.

    def draw(self, name: str, paint: Callable[[], Figure | None]) -> str:
        with plt.rc_context(STYLE):
            figure = paint()
            path = self.figures / f"{name}.png"
            if figure is None:
                path.unlink(missing_ok=True)
                return ""
            self.figures.mkdir(parents=True, exist_ok=True)
            figure.savefig(path)
            plt.close(figure)
        caption = (paint.__doc__ or "").split("\n")[0]
        return f"\n![{caption}]({self.figures.name}/{path.name})\n\n*{caption}*\n"

    def curves(self) -> Figure | None:
        """MAP@R on validation classes while training; mean over the seeds."""
        panels = [
            p for p in PLACES if any(self.results.tested(Cell(*p, "clean", n)) for n in self.main)
        ]

        def paint(axes: Axes, panel: tuple[str, str]) -> None:
            dataset, start = panel
            lines = {}
            for name in self.main:
                runs = self.results.tested(Cell(dataset, start, "clean", name))
                if runs:
                    epochs = self.preset.budget.epochs
                    lines[name] = np.mean([curve(run, epochs) for run in runs], axis=0)
            plot_lines(axes, lines, range(self.preset.budget.epochs + 1))
            axes.set(title=place(dataset, start), xlabel="epoch")
            axes.xaxis.get_major_locator().set_params(integer=True)

        return panelled(panels, paint, "MAP@R, validation classes")

    def robustness(self) -> Figure | None:
        """MAP@R on test classes, by share of wrong labels and of images withheld; 95% intervals."""
        panels = [
            (dataset, start, kind)
            for kind in (NOISE, WITHHELD)
            for dataset, start in PLACES
            if any(self.results.tested(at(dataset, c, start)(n)) for c in kind for n in MAIN)
        ]

        def paint(axes: Axes, panel: tuple[str, str, tuple[str, ...]]) -> None:
            dataset, start, kind = panel
            lines, halves, shares = {}, {}, []
            conditions = [
                c for c in ("clean", *kind) if Cell(dataset, start, c, MAIN[0]) in self.planned
            ]
            shares = [100 * (CONDITIONS[c].noise + CONDITIONS[c].withheld) for c in conditions]
            for name in MAIN:
                found = [self.measured(at(dataset, c, start)(name), MAP) for c in conditions]
                lines[name] = np.array([f.mean if f else np.nan for f in found])
                halves[name] = np.array([f.half if f else np.nan for f in found])
            plot_lines(axes, lines, shares, halves)
            of = "wrong training labels, %" if kind is NOISE else "training images withheld, %"
            axes.set(title=place(dataset, start), xlabel=of, xticks=shares, ylim=(0, None))

        return panelled(panels, paint, "MAP@R, test classes")

    def additions(self) -> Figure | None:
        """What an addition changes in a trial, by its weight; validation data."""

        def changes(cell: Cell, addition: str, weight: str) -> list[tuple[float, float]]:
            plain = self.results.trials.get(
                cell._replace(method=cell.method.removesuffix(addition))
            )
            return [
                (with_it["setting"][weight], 100 * (with_it["validation"] / before - 1))
                for number, with_it in self.results.trials.get(cell, {}).items()
                if plain and number in plain and (before := plain[number]["validation"]) > 0
            ]

        def paint(axes: Axes, panel: tuple[str, str]) -> None:
            addition, weight = panel
            names = [name for name in METHODS if name.endswith(addition)]
            for dataset, color in zip(DATASETS, COLORS.values(), strict=True):
                for start, marker in zip(STARTS, "ox", strict=True):
                    cells = [Cell(dataset, start, "clean", name) for name in names]
                    found = [change for cell in cells for change in changes(cell, *panel)]
                    if found:
                        label = place(dataset, start)
                        points = np.transpose(found)
                        axes.plot(*points, marker, color=color, ms=4, alpha=0.7, label=label)
            axes.axhline(0, color=MUTED, lw=1)
            axes.set(title=ADDITIONS[panel], xlabel=weight.removesuffix("_lsd"))
            axes.set_xscale("log" if addition == "+lsd" else "linear")
            axes.set_yscale("symlog", linthresh=10)
            axes.set_yticks((-90, -50, -20, -10, 0, 10, 20, 50), minor=False)
            axes.yaxis.set_major_formatter("{x:g}")

        with_trials = {cell.method for cell in self.results.trials}
        panels = [p for p in ADDITIONS if any(name.endswith(p[0]) for name in with_trials)]
        return panelled(panels, paint, "change of the score, %")

    def costs(self) -> Figure | None:
        """MAP@R on test classes beside the time of a training step; from scratch."""
        panels = [d for d in BOTH if any(self.results.tested(at(d)(name)) for name in self.main)]

        def paint(axes: Axes, dataset: str) -> None:
            for number, name in enumerate(self.main, 1):
                cell = at(dataset)(name)
                found, cost = self.measured(cell, MAP), self.cost(cell, "seconds_per_step", 1000)
                if found and cost:
                    runs = self.results.tested(cell)
                    seconds = float(np.median([r.get("seconds_per_step", np.nan) for r in runs]))
                    color = color_of(name) or MUTED
                    label = f"{number}  {METHODS[name].label}"
                    x, y = 1000 * seconds, found.mean
                    axes.plot(x, y, "o", color=color, markersize=5, label=label)
                    axes.annotate(str(number), (x, y), (4, 3), textcoords="offset points",
                                  color=color, fontsize=9)  # fmt: skip
            axes.margins(0.1)
            axes.set(title=DATASETS[dataset].label, xlabel="ms a step", xlim=(0, None))
            axes.set_ylim(bottom=0)

        return panelled(panels, paint, "MAP@R, test classes")


ADDITIONS = {("+lsd", "alpha_lsd"): "LSD", ("+cir", "strength"): "CIR"}
PLACES = [(dataset, start) for start in STARTS for dataset in BOTH]


def place(dataset: str, start: str) -> str:
    return f"{DATASETS[dataset].label}, {STARTS[start]}"


def at(dataset: str, condition: str = "clean", start: str = "scratch") -> Callable[[str], Cell]:
    return lambda name: Cell(dataset, start, condition, name)


def everywhere(
    conditions: Sequence[str], start: str = "scratch"
) -> dict[str, Callable[[str], Cell]]:
    return {
        f"{DATASETS[dataset].label}, {CONDITIONS[condition].label}": at(dataset, condition, start)
        for dataset in BOTH
        for condition in conditions
    }


# ---- Text.


def table(
    heads: Iterable[str], body: Iterable[Iterable[str]], of: Literal["figures", "words"] = "figures"
) -> str:
    """The first column is a name."""
    heads = list(heads)
    align = "--:" if of == "figures" else "---"
    rows = [heads, ["---", *[align] * (len(heads) - 1)], *map(list, body)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def signed(found: Interval, unit: str = "points") -> str:
    factor = 1 if unit == "epochs" else 100
    return f"{factor * found.mean:+.1f} ± {factor * found.half:.1f}"


def count(judged: list[Judged]) -> str:
    verdicts = [j.verdict for j in judged]
    return ", ".join(
        f"{verdicts.count(kind)} {SIGNS[kind] or kind}" for kind in SIGNS if kind in verdicts
    )


def comparisons(judged: list[Judged]) -> str:
    body = []
    for j in judged:
        unit = j.comparison.unit
        shown = f"{signed(j.difference, unit)} {unit}" if j.difference else NOT_RUN
        body.append([j.comparison.label, shown, SIGNS[j.verdict]])
    return table(["", "difference", ""], body)


def label_reports(records: Sequence[Record]) -> str:
    """What `labels.py` measured."""
    columns = {
        "distrusted": "distrusted",
        "precision": "precision",
        "recall": "recall",
        "mistrusted": "of right ones distrusted",
        "average_precision": "average precision",
        "last_look": "of the last look alone",
        "plain_neighbours": "of plain neighbours",
    }
    body = []
    for dataset, condition in dict.fromkeys((r["dataset"], r["condition"]) for r in records):
        runs = [r for r in records if (r["dataset"], r["condition"]) == (dataset, condition)]
        shown = [f"{DATASETS[dataset].label}, {CONDITIONS[condition].label}"]
        for name in columns:
            values = [r[name] for r in runs if name in r]
            found = interval(values) if values else None
            shown.append(f"{100 * found.mean:.1f} ± {100 * found.half:.1f}" if found else "")
        body.append(shown)
    return table(["", *columns.values()], body)


def source(claim: Claim) -> str:
    is_id = claim.source.replace(".", "").isdigit()
    return f"[{claim.source}](https://arxiv.org/abs/{claim.source})" if is_id else claim.source


def mean_probe(rows: list[Record], key: str) -> str:
    values = [row[key] for row in rows if row.get(key) is not None]
    return f"{np.mean(values):.3g}" if values else ""


def span(distribution: BaseDistribution) -> str:
    if isinstance(distribution, FloatDistribution):
        scale = ", log" if distribution.log else ""
        return f"{distribution.low:g}–{distribution.high:g}{scale}"
    return ", ".join(map(str, distribution.choices))  # type: ignore[attr-defined]


INTRODUCTION = """\
# Do the methods do what their papers claim?

Rendered by `python -m benchmarks.evidence.render` from the lines in
`benchmarks/evidence/results/`; what is run is declared in `benchmarks/evidence/plan.py`. The
protocol is that of *A Metric Learning Reality Check* (Musgrave, Belongie, Lim, ECCV 2020): equal
tuning budgets, settings chosen on held-out classes, several seeds.

- Presets {names}: every method has {trials} random trials from its search space, of which MAP@R
  on validation classes (a fifth of the training classes) picks one, and then {seeds} seeds. Under
  wrong labels the trials are made at 30%; with images withheld the clean setting is kept.
- A run is {epochs} epochs of {steps} batches of {batch_size} images, four of a class where there
  are classes enough, and its last epoch counts. The network is a convolutional one of {width}
  channels, embeddings have {embedding_size} dimensions.
- Test classes are never seen before the one measurement that a seed ends with. Omniglot: the
  authors' split, 964 classes to train and validate, 659 unseen. CIFAR-100: classes 0-49 and 50-99.
- Figures are means in percent with 95% intervals over the seeds, which vary the initial weights,
  the batches and the wrong labels, and not the split into classes. The **best** of a column is
  bold; what is *italic* the paired seeds do not tell from it.
- Fine-tuning starts from NormalizedSoftmax on one half of the training classes and goes on with the
  other (in classification, the test images are those of this other half): our stand-in for the
  papers' ImageNet features. Labels and images are spoilt in the other half alone, but for the long
  tail, which both have.

These are small networks on small images. What holds here may fail elsewhere, and the other way
round."""


def render(preset_name: str, records: list[Record], docs: Path, results: Path = RESULTS) -> Path:
    name, preset = whole(preset_name)
    page = Page(Results(preset, records), docs / "evidence")
    notes = results / f"notes-{name}.md"
    protocols = read(results / "protocol.jsonl")
    checked = read(results / f"labels-{name}.jsonl")
    parts = [
        INTRODUCTION.format(
            names=", ".join(f"`{n}`" for n, p in PRESETS.items() if p.budget == preset.budget),
            trials=preset.trials,
            seeds=preset.seeds,
            **preset.describe(),
        ),
        notes.read_text().strip() if notes.exists() else "",
        "## Claims\n\n" + page.claims(),
        "## Recipes\n\n" + page.recipes(),
        "## All methods on clean labels\n\n" + page.clean(),
        longer(read(results / "long.jsonl"), docs),
        "## Wrong labels, and few images\n\nMAP@R.\n\n" + page.conditions(),
        "## Other batches\n\nThe same methods in other batches than 16 classes with 4 images of"
        " each: *random*, drawn as the images come, where no two need be of a class; and *square*,"
        " 8 classes with 8 images of each, as SmoothAP has them above, because PML's is right for"
        " no others. MAP@R.\n\n" + page.batches(),
        "## Leaving out distrusted labels\n\nAfter each epoch the batches are drawn from the images"
        " whose labels `LabelNoiseDetector` does not distrust. MAP@R.\n\n" + page.cleaned(),
        "## Long-tailed classes\n\nOmniglot's training alphabets keep from all to a twentieth of"
        " their images, in batches drawn as the images come. MAP@R on unseen classes of the same"
        " alphabets; the rare ones are the third with the fewest images.\n\n" + page.long_tail(),
        "## Distillation\n\nMAP@R.\n\n" + page.distillation(),
        "## Interference\n\nAccuracy in 1000 episodes on unseen Omniglot classes.\n\n"
        + page.few_shot()
        + "\n\nAccuracy in classification, CIFAR-100.\n\n"
        + page.classes(),
        "## How much of an addition\n\nEach trial of a method with self-distillation or"
        " interference beside the same trial without, which has the same settings and the same"
        " seed." + page.draw("additions", page.additions),
        "## Miners at 30% wrong labels\n\nMAP@R.\n\n" + page.miner(),
        "## Re-ranking\n\nThe same embeddings with plain nearest neighbours and with"
        " `ContextualKNN`, whose number of neighbours the validation classes choose.\n\n"
        + page.by_start(page.reranking),
        "## Combinations\n\nMAP@R on Omniglot.\n\n" + page.combinations(),
        "## What the mechanisms did\n\nAfter the last epoch, on 256 training images in batches as"
        " the losses see them. *Purity*: of the nearest images to a rightly labelled one, the share"
        " truly of its class. *Trusted*: the share of labels that the vote of"
        " `ContextualSimilarityMiner` does not overrule. *Neighbourhood*: how many images lie"
        " within the contextual loss's slack of 0.05. *Turn*: 1 less the cosine between a center"
        " before and after the epoch. *Entropy*: of the teacher's softmax, as a share of the"
        " uniform one's.\n\n" + page.mechanisms(),
        f"## Distrusted labels\n\nWhat `LabelNoiseDetector` finds while"
        f" {METHODS[labels.METHOD].label}"
        " trains on the labels, with a look after each epoch: a label is distrusted if its class"
        " gets less of the vote than chance would give it. Average"
        " precision is that of the order of all images by their support, for finding the wrong"
        " labels; *plain neighbours* are ordered by how many of the same number of nearest ones"
        f" have the same label. Percent, {labels.SEEDS} seeds.\n\n" + label_reports(checked)
        if checked
        else "",
        "## The papers' own protocols\n\n" + "\n".join(protocol.rows(protocols))
        if protocols
        else "",
        "## Search spaces\n\n" + page.spaces(),
    ]
    docs.mkdir(parents=True, exist_ok=True)
    path = docs / "evidence.md"
    path.write_text("\n\n".join(part for part in parts if part) + "\n")
    return path


def longer(records: list[Record], docs: Path) -> str:
    """The preset that asks whether there were steps enough."""
    if not records:
        return ""
    preset = PRESETS["long"]
    page = Page(Results(preset, records), docs / "evidence-long")
    budget = preset.budget
    return (
        f"## With more steps\n\nThe same network on clean labels for {budget.epochs} epochs of"
        f" {budget.steps} batches, tuned anew.\n\n" + page.clean()
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="render.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--preset", choices=PRESETS)
    parser.add_argument("--results", type=Path, default=RESULTS, help="default: %(default)s")
    parser.add_argument("--docs", type=Path, default=DOCS, help="default: %(default)s")
    args = parser.parse_args(arguments)
    full = (args.results / "full.jsonl").exists()
    name, _ = whole(args.preset or ("full" if full else "small"))
    try:
        print(render(name, read(args.results / f"{name}.jsonl"), args.docs, args.results))
    except UserError as error:
        print(f"render.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
