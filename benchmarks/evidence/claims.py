"""The papers' claims, and the comparisons that they come to. `Scores` gives a cell's test scores by
seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .plan import (
    ACCURACY,
    BASELINES,
    BOTH,
    CONDITIONS,
    DATASETS,
    FEW_SHOT,
    MAIN,
    MAP,
    METHODS,
    NOISE,
    P1,
    PROXY_BASED,
    RARE,
    RERANKED,
    STARTS,
    WITHHELD,
    Cell,
    Preset,
)

BySeed = dict[int, float]
Scores = Callable[[Cell, str], BySeed]  # raises NotRunError where a seed is missing


class NotRunError(Exception):
    """Some of the runs that a comparison needs are missing."""


@dataclass(frozen=True)
class Comparison:
    """Differences by seed, whose 95% interval is to lie above a threshold."""

    cell: Cell  # whose method the claim is about
    of: str  # what is compared; empty where the claim says it
    differences: Callable[[Scores], list[float]]
    threshold: float = 0.0
    unit: str = "points"  # hundredths; or epochs

    @property
    def label(self) -> str:
        shown = [DATASETS[self.cell.dataset].label, STARTS[self.cell.start]]
        if self.cell.condition != "clean":
            shown.append(CONDITIONS[self.cell.condition].label)
        return ", ".join([*shown, self.of] if self.of else shown)


@dataclass(frozen=True)
class Claim:
    text: str
    source: str
    test: str
    comparisons: list[Comparison]


def minus(a: BySeed, b: BySeed) -> list[float]:
    return [a[seed] - b[seed] for seed in sorted(a)]


def best(scores: Scores, cell: Cell, methods: tuple[str, ...], metric: str) -> str:
    """The method with the highest mean on the test classes: the hardest to beat."""
    means = {name: sum(scores(cell._replace(method=name), metric).values()) for name in methods}
    return max(means, key=means.__getitem__)


def above_best(cell: Cell, others: tuple[str, ...], metric: str) -> Callable[[Scores], list[float]]:
    def differences(scores: Scores) -> list[float]:
        other = cell._replace(method=best(scores, cell, others, metric))
        return minus(scores(cell, metric), scores(other, metric))

    return differences


def grows(cell: Cell, others: tuple[str, ...]) -> Callable[[Scores], list[float]]:
    """How much larger the margin over the best of the others is than under clean conditions."""

    def differences(scores: Scores) -> list[float]:
        margin, before = (
            above_best(c, others, MAP)(scores) for c in (cell, cell._replace(condition="clean"))
        )
        return [a - b for a, b in zip(margin, before, strict=True)]

    return differences


def in_half_the_epochs(cell: Cell, others: tuple[str, ...]) -> Callable[[Scores], list[float]]:
    """Half the epochs that the best of the others takes to its final value (MAP@R on validation
    classes), less those that this takes to the same."""

    def differences(scores: Scores) -> list[float]:
        other = cell._replace(method=best(scores, cell, others, MAP))
        taken = {}
        for c in (cell, other):
            curves, finals = scores(c, "curve"), scores(other, "curve")
            taken[c] = {seed: epochs_to(curves[seed], finals[seed][-1]) for seed in curves}
        return [taken[other][seed] / 2 - taken[cell][seed] for seed in sorted(taken[cell])]

    return differences


def epochs_to(curve: Any, value: float) -> float:
    """The first epoch, from 0, that reaches the value; if none does, one more than there were."""
    return next((epoch for epoch, v in enumerate(curve) if v >= value), len(curve))


def with_and_without(cell: Cell, without: str, metric: str) -> Callable[[Scores], list[float]]:
    return lambda scores: minus(scores(cell, metric), scores(cell._replace(method=without), metric))


def re_ranked(place: Cell) -> Callable[[Scores], list[float]]:
    """The mean over the methods: what is compared are seeds."""

    def differences(scores: Scores) -> list[float]:
        cells = [place._replace(method=name) for name in MAIN]
        by_method = [minus(scores(c, RERANKED), scores(c, MAP)) for c in cells]
        return [sum(column) / len(cells) for column in zip(*by_method, strict=True)]

    return differences


def claims(preset: Preset) -> list[Claim]:
    """The claims, with the comparisons that the preset has cells for."""
    planned = set(preset.cells())
    baselines = tuple(BASELINES)
    in_any_batches = baselines + tuple(f"{n}_random" for n in PROXY_BASED if n in BASELINES)

    def cells(method: str, condition: str = "clean") -> list[Cell]:
        datasets = (*BOTH, "cifar100_classes")
        every = [
            Cell(dataset, start, condition, method) for dataset in datasets for start in STARTS
        ]
        return [cell for cell in every if cell in planned]

    def centers(method: str, others: tuple[str, ...] = baselines) -> list[Comparison]:
        found = []
        for cell in cells(method):
            for metric, name in ((P1, "R@1"), (MAP, "MAP@R")):
                found.append(Comparison(cell, name, above_best(cell, others, metric)))
            found.append(
                Comparison(
                    cell,
                    "half the epochs",
                    in_half_the_epochs(cell, others),
                    threshold=-0.01,  # exactly half will do
                    unit="epochs",
                )
            )
        return found

    def robust(method: str) -> list[Comparison]:
        found = []
        for clean in cells(method):
            for levels in (NOISE, WITHHELD):
                spoilt = [clean._replace(condition=level) for level in levels]
                for cell in [cell for cell in spoilt if cell in planned][-1:]:  # the hardest level
                    found += [
                        Comparison(cell, "margin", above_best(cell, baselines, MAP)),
                        Comparison(cell, "growth of the margin", grows(cell, baselines)),
                    ]
        return found

    def miner(name: str) -> list[Comparison]:
        return [
            Comparison(
                cell,
                METHODS[base].label,
                above_best(cell, (base, f"{base}+ms_miner", f"{base}+triplet_miner"), MAP),
            )
            for base in ("contrastive", "triplet")
            for cell in cells(f"{base}+{name}", "noise30")
        ]

    all_claims = [
        Claim(
            "CCL is better and faster than proxy and pair losses",
            "2308.00458",
            "above the best baseline; its final value in half the epochs",
            centers("center_contrastive"),
        ),
        Claim(
            "the same, with averaged centers",
            "the other reading of its center bank",
            "as above",
            centers("center_contrastive_average"),
        ),
        *(
            Claim(
                f"the same, with {centers_are} centers and batches drawn at random",
                "what the mechanism suggests",
                "as above, with PML's proxy losses in such batches among the baselines",
                centers(f"{method}_random", in_any_batches),
            )
            for method, centers_are in {
                "center_contrastive": "optimized",
                "center_contrastive_average": "averaged",
            }.items()
        ),
        Claim(
            "CCL re-balances classes",
            "2308.00458",
            "MAP@R on unseen classes of the rare alphabets above ProxyAnchor's",
            [
                Comparison(cell, "rare alphabets", with_and_without(cell, "proxy_anchor", RARE))
                for cell in cells("center_contrastive", "long_tail")
            ],
        ),
        Claim(
            "Contextual is best under label noise and overfits least with little data",
            "2210.01908",
            "margin over the best baseline above 0 at the hardest level, and above that when clean",
            robust("contextual"),
        ),
        Claim(
            "the same, with a warm-up of the contextual term",
            "ours",
            "as above",
            robust("contextual_warmup"),
        ),
        Claim(
            "LSD improves every loss",
            "2206.08880",
            "with against without, for each baseline",
            [
                Comparison(cell, METHODS[name].label, with_and_without(cell, name, MAP))
                for name in baselines
                for cell in cells(f"{name}+lsd")
            ],
        ),
        Claim(
            "CIR improves few-shot recognition with the triplet loss",
            "2009.02396",
            "with against without, on unseen Omniglot classes",
            [
                Comparison(cell, episode, with_and_without(cell, "triplet", episode))
                for cell in cells("triplet+cir")
                for episode in FEW_SHOT
            ],
        ),
        Claim(
            "CIR is on par with label smoothing in classification",
            "2009.02396",
            "accuracy at most half a point below label smoothing's",
            [
                Comparison(
                    cell,
                    "",
                    with_and_without(cell, "softmax_smoothed", ACCURACY),
                    threshold=-0.005,
                )
                for cell in cells("softmax+cir")
            ],
        ),
        Claim(
            "the contextual miner helps under label noise",
            "ours",
            "at 30% wrong labels, above the best of no miner, MultiSimilarityMiner and"
            " TripletMarginMiner",
            miner("context_miner"),
        ),
        Claim(
            "the same, with a late start of the miner",
            "ours",
            "as above",
            miner("context_miner_late"),
        ),
        Claim(
            "contextual re-ranking improves MAP@R",
            "ours, cf. 1701.08398",
            "re-ranked against plain nearest neighbours, mean over the methods",
            [Comparison(cell, "", re_ranked(cell)) for cell in cells("contrastive")],
        ),
    ]
    return [claim for claim in all_claims if claim.comparisons]
