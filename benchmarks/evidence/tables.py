"""The tables of the page. `TABLES` names them as the template does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from optuna.distributions import BaseDistribution, FloatDistribution

from .claim_tables import best_method_table, claim_table, comparison_tables
from .components import LR
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
from .formatting import (
    column,
    difference,
    markdown_table,
    mean_percent,
    method_table,
    paired_table,
)
from .methods import (
    BASELINES,
    CLASSIFIERS,
    COMBINATIONS,
    LABEL_FILTERED,
    MAIN,
    METHODS,
    MINED,
    PROXY_BASED,
    RANDOM_BATCHES,
    SQUARE_BATCHES,
    names_of,
    with_last_addition,
)
from .metrics import ACCURACY, FEW_SHOT, MAP, P1, R_PRECISION, RARE, RERANKED, RERANKED_P1
from .records import Record, Results
from .verdicts import NOT_RUN, interval


def titled(tables: Mapping[str, str]) -> str:
    """The tables that are not empty, under headings."""
    return "\n\n".join(f"### {title}\n\n{table}" for title, table in tables.items() if table)


def by_init(table: Callable[[str], str]) -> str:
    return titled({title.capitalize(): table(init) for init, title in INITS.items()})


def scenarios_under(
    conditions: Sequence[str], init: str, datasets: Sequence[str] = RETRIEVAL_DATASETS
) -> dict[str, Scenario]:
    return {
        f"{DATASETS[dataset].label}, {CONDITIONS[condition].label}": Scenario(
            dataset, init, condition
        )
        for dataset in datasets
        for condition in conditions
    }


# ---- Methods.


def clean_tables(results: Results) -> str:
    tables = {}
    for scenario in SCENARIOS:
        experiments = [Experiment(*scenario, n) for n in results.preset.grids["clean"].methods]
        experiments = [e for e in experiments if e in results.planned]
        if experiments:
            columns = [column(results, experiments, m) for m in (P1, R_PRECISION, MAP)]
            columns.append([cost(results, e, "seconds_per_step", 1000) for e in experiments])
            columns.append([cost(results, e, "peak_mib", 1) for e in experiments])
            labels = [METHODS[e.method].label for e in experiments]
            header = ["", "R@1", "R-precision", "MAP@R", "ms per step", "peak MiB"]
            tables[scenario.title] = markdown_table(header, zip(labels, *columns, strict=True))
    return titled(tables)


def cost(results: Results, experiment: Experiment, name: str, factor: float) -> str:
    values = [run[name] for run in results.tested(experiment) if run.get(name)]
    return f"{factor * float(np.median(values)):.0f}" if values else ""


def condition_tables(results: Results) -> str:
    tables = {}
    for scenario in SCENARIOS:
        columns = {
            CONDITIONS[condition].label: (scenario.under(condition), MAP)
            for condition in ("clean", *NOISE, *WITHHELD)
            if Experiment(*scenario.under(condition), next(iter(MAIN))) in results.planned
        }
        if len(columns) > 1:
            tables[scenario.title] = method_table(results, MAIN, columns)
    return titled(tables)


def batch_tables(results: Results) -> str:
    def tables(init: str) -> str:
        columns = scenarios_under(("clean", "noise30"), init)
        kinds = {"random": RANDOM_BATCHES, "square": SQUARE_BATCHES}
        found = [paired_table(results, names, kind, columns) for kind, names in kinds.items()]
        return "\n\n".join(filter(None, found))

    return by_init(tables)


def label_filter_tables(results: Results) -> str:
    return by_init(
        lambda init: paired_table(
            results, LABEL_FILTERED, "filtered", scenarios_under(("clean", *NOISE), init)
        )
    )


def long_tail_table(results: Results) -> str:
    columns = {
        f"{title}, {alphabets}": (Scenario("omniglot", init, "long_tail"), metric)
        for init, title in INITS.items()
        for alphabets, metric in (("all alphabets", MAP), ("rare alphabets", RARE))
    }
    return method_table(results, PROXY_BASED, columns)


def lsd_tables(results: Results) -> str:
    def table(addition: str, init: str) -> str:
        variations = with_last_addition(addition)
        variations = {name: base for name, base in variations.items() if base in BASELINES}
        columns = {DATASETS[d].label: Scenario(d, init) for d in RETRIEVAL_DATASETS}
        return paired_table(results, variations, "+ LSD", columns)

    return titled(
        {
            **{title.capitalize(): table("lsd", init) for init, title in INITS.items()},
            "From scratch, at low temperature": table("lsd_low_temperature", "scratch"),
        }
    )


def few_shot_table(results: Results) -> str:
    columns = {
        f"{title}, {episodes}": (Scenario("omniglot", init), episodes)
        for init, title in INITS.items()
        for episodes in FEW_SHOT
    }
    return method_table(results, ("triplet", "triplet+cir"), columns)


def classification_table(results: Results) -> str:
    columns = {
        title: (Scenario("cifar100_classes", init), ACCURACY) for init, title in INITS.items()
    }
    return method_table(results, CLASSIFIERS, columns)


def miner_table(results: Results) -> str:
    columns = {s.title: (s.under("noise30"), MAP) for s in SCENARIOS}
    return method_table(results, ("contrastive", "triplet", *MINED), columns)


def reranking_tables(results: Results) -> str:
    def table(init: str) -> str:
        rows = []
        for name in MAIN:
            row = [METHODS[name].label]
            for dataset in RETRIEVAL_DATASETS:
                e = Experiment(dataset, init, "clean", name)
                row += [mean_percent(results, e, metric) for metric in (MAP, RERANKED)]
                row.append(difference(results, e, e, RERANKED, MAP))
                row.append(difference(results, e, e, RERANKED_P1, P1))
            rows.append(row)
        header = [""]
        for dataset in RETRIEVAL_DATASETS:
            header += [
                f"{DATASETS[dataset].label} MAP@R",
                "re-ranked",
                "difference",
                "R@1 difference",
            ]
        return markdown_table(header, rows)

    return by_init(table)


def combination_table(results: Results) -> str:
    omniglot = Scenario("omniglot", "scratch")
    columns = {
        f"{CONDITIONS[condition].label}{suffix}": (omniglot.under(condition), metric)
        for condition in ("clean", "noise30")
        for suffix, metric in (("", MAP), (", re-ranked", RERANKED))
    }
    names = [n for n in COMBINATIONS if results.tested(Experiment(*omniglot, n))]
    return method_table(results, names or COMBINATIONS, columns)


# ---- Mechanisms and search spaces.


def probe_tables(results: Results) -> str:
    """The probes after the last epoch."""
    columns = {
        "purity": "neighbor purity",
        "plurality_correct": "plurality, correct labels",
        "plurality_wrong": "plurality, wrong labels",
        "neighborhood_size": "neighborhood size",
        "mean_cosine": "mean cosine",
        "center_drift": "center drift",
        "teacher_entropy": "teacher entropy",
    }
    tables = {}
    for title, scenario in scenarios_under(("clean", "noise30"), "scratch").items():
        rows = []
        for name, method in METHODS.items():
            runs = results.tested(Experiment(*scenario, name))
            probes = [run["history"][-1]["probes"] for run in runs if run["history"]]
            if probes:
                rows.append([method.label, *(mean_probe(probes, key) for key in columns)])
        tables[title] = markdown_table(["", *columns.values()], rows) if rows else ""
    return titled(tables) or NOT_RUN


def mean_probe(probes: Sequence[Record], key: str) -> str:
    values = [probe[key] for probe in probes if probe.get(key) is not None]
    return f"{np.mean(values):.3g}" if values else ""


def space_table(results: Results) -> str:
    planned = {experiment.method for experiment in results.planned}
    rows = [
        [METHODS[n].label, ", ".join(f"`{k}` {span(d)}" for k, d in METHODS[n].space.items())]
        for n in names_of(lambda m: m.name in planned)
    ]
    return markdown_table(["", f"`lr` {span(LR['lr'])}, and"], rows, align="left")


def span(distribution: BaseDistribution) -> str:
    if isinstance(distribution, FloatDistribution):
        scale = ", log" if distribution.log else ""
        return f"{distribution.low:g}–{distribution.high:g}{scale}"
    return ", ".join(map(str, distribution.choices))  # type: ignore[attr-defined]


def label_report_table(records: Sequence[Record]) -> str:
    """What `labels.py` measured. Empty if there are no records."""
    columns = {
        "flagged": "flagged",
        "precision": "precision",
        "recall": "recall",
        "false_positive_rate": "false positive rate",
        "average_precision": "average precision",
        "average_precision_last": "AP, last update only",
        "average_precision_knn": "AP, kNN agreement",
    }
    rows = []
    for dataset, condition in dict.fromkeys((r["dataset"], r["condition"]) for r in records):
        runs = [r for r in records if (r["dataset"], r["condition"]) == (dataset, condition)]
        row = [f"{DATASETS[dataset].label}, {CONDITIONS[condition].label}"]
        for name in columns:
            values = [r[name] for r in runs if name in r]
            value = interval(values) if values else None
            row.append(f"{100 * value.mean:.1f} ± {100 * value.half_width:.1f}" if value else "")
        rows.append(row)
    return markdown_table(["", *columns.values()], rows) if rows else ""


TABLES: dict[str, Callable[[Results], str]] = {
    "claims": claim_table,
    "comparisons": comparison_tables,
    "best_methods": best_method_table,
    "clean": clean_tables,
    "conditions": condition_tables,
    "batches": batch_tables,
    "label_filter": label_filter_tables,
    "long_tail": long_tail_table,
    "lsd": lsd_tables,
    "few_shot": few_shot_table,
    "classification": classification_table,
    "miners": miner_table,
    "reranking": reranking_tables,
    "combinations": combination_table,
    "probes": probe_tables,
    "spaces": space_table,
}
