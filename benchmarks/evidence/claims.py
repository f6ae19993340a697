"""The papers' claims, and ours, with the comparisons that test them."""

from __future__ import annotations

from dataclasses import dataclass

from .comparisons import (
    Comparison,
    difference_to,
    difference_to_best,
    half_epochs_margin,
    margin_growth,
    reranking_gain,
)
from .conditions import INITS, NOISE, RETRIEVAL_DATASETS, WITHHELD, Experiment
from .methods import BASELINES, METHODS, RANDOM_BATCHES, with_last_addition
from .metrics import ACCURACY, FEW_SHOT, MAP, P1, RARE
from .presets import Preset

BASELINES_IN_ANY_BATCHES = (
    *BASELINES,
    *(name for name, base in RANDOM_BATCHES.items() if base in BASELINES),
)


@dataclass(frozen=True)
class Claim:
    title: str
    source: str  # an arXiv id, or words
    test: str
    comparisons: list[Comparison]


def claims(preset: Preset) -> list[Claim]:
    """The claims, with the comparisons whose experiments are in the preset."""
    every = [
        *center_claims(preset),
        *contextual_claims(preset),
        lsd_claim(preset),
        *cir_claims(preset),
        *miner_claims(preset),
        Claim(
            "Contextual re-ranking improves MAP@R",
            "ours, cf. 1701.08398",
            "re-ranked minus plain nearest neighbors, mean over the methods",
            [Comparison(e, "", reranking_gain(e.scenario)) for e in planned(preset, "contrastive")],
        ),
    ]
    return [claim for claim in every if claim.comparisons]


def planned(preset: Preset, method: str, condition: str = "clean") -> list[Experiment]:
    """The experiments of a method in the preset, in the order of the page."""
    experiments = set(preset.experiments())
    return [
        experiment
        for dataset in (*RETRIEVAL_DATASETS, "cifar100_classes")
        for init in INITS
        if (experiment := Experiment(dataset, init, condition, method)) in experiments
    ]


def center_claims(preset: Preset) -> list[Claim]:
    def better_and_faster(title: str, source: str, method: str) -> Claim:
        test = "R@1 and MAP@R above the best baseline's; its final MAP@R in half the epochs"
        rivals = tuple(BASELINES)
        if METHODS[method].batches == "random":
            test += "; the baselines include PML's proxy losses in random batches"
            rivals = BASELINES_IN_ANY_BATCHES
        comparisons = []
        for e in planned(preset, method):
            epochs = half_epochs_margin(e, rivals)
            comparisons += [
                Comparison(e, "R@1", difference_to_best(e, rivals, P1)),
                Comparison(e, "MAP@R", difference_to_best(e, rivals, MAP)),
                # Exactly half the epochs is enough.
                Comparison(e, "half the epochs", epochs, threshold=-0.01, unit="epochs"),
            ]
        return Claim(title, source, test, comparisons)

    return [
        better_and_faster(
            "CCL is better and faster than proxy and pair losses",
            "2308.00458",
            "center_contrastive",
        ),
        better_and_faster(
            "CCL with EMA centers is better and faster",
            "another reading of its center bank",
            "center_contrastive_ema",
        ),
        better_and_faster(
            "CCL in random batches is better and faster",
            "suggested by the mechanism",
            "center_contrastive_random",
        ),
        better_and_faster(
            "CCL with EMA centers in random batches is better and faster",
            "suggested by the mechanism",
            "center_contrastive_ema_random",
        ),
        Claim(
            "CCL re-balances classes",
            "2308.00458",
            "MAP@R above ProxyAnchor's on unseen classes of the rare alphabets",
            [
                Comparison(e, "rare alphabets", difference_to(e, "proxy_anchor", RARE))
                for e in planned(preset, "center_contrastive", "long_tail")
            ],
        ),
    ]


def contextual_claims(preset: Preset) -> list[Claim]:
    test = "margin over the best baseline above 0 at the hardest level, and larger than when clean"
    return [
        Claim(
            "Contextual is best under label noise and overfits least with little data",
            "2210.01908",
            test,
            robustness(preset, "contextual"),
        ),
        Claim(
            "Contextual with a warm-up is best under label noise and overfits least",
            "ours",
            test,
            robustness(preset, "contextual_warmup"),
        ),
    ]


def robustness(preset: Preset, method: str) -> list[Comparison]:
    """The margin and its growth at the hardest level of noise and of withheld images."""
    experiments = set(preset.experiments())
    found = []
    for clean in planned(preset, method):
        for levels in (NOISE, WITHHELD):
            candidates = [clean._replace(condition=level) for level in levels]
            for e in [e for e in candidates if e in experiments][-1:]:
                found += [
                    Comparison(e, "margin", difference_to_best(e, tuple(BASELINES), MAP)),
                    Comparison(e, "growth of the margin", margin_growth(e, tuple(BASELINES))),
                ]
    return found


def lsd_claim(preset: Preset) -> Claim:
    return Claim(
        "LSD improves every loss",
        "2206.08880",
        "MAP@R with LSD minus without, for each baseline",
        [
            Comparison(e, METHODS[base].label, difference_to(e, base, MAP))
            for name, base in with_last_addition("lsd").items()
            if base in BASELINES
            for e in planned(preset, name)
        ],
    )


def cir_claims(preset: Preset) -> list[Claim]:
    return [
        Claim(
            "CIR improves few-shot recognition with the triplet loss",
            "2009.02396",
            "accuracy with CIR minus without, on unseen Omniglot classes",
            [
                Comparison(e, episodes, difference_to(e, "triplet", episodes))
                for e in planned(preset, "triplet+cir")
                for episodes in FEW_SHOT
            ],
        ),
        Claim(
            "CIR is on par with label smoothing in classification",
            "2009.02396",
            "accuracy at most half a point below label smoothing's",
            [
                Comparison(e, "", difference_to(e, "softmax_smoothed", ACCURACY), threshold=-0.005)
                for e in planned(preset, "softmax+cir")
            ],
        ),
    ]


def miner_claims(preset: Preset) -> list[Claim]:
    def comparisons(miner: str) -> list[Comparison]:
        found = []
        for name, base in with_last_addition(miner).items():
            with_pml_miner = [
                n for n, m in METHODS.items() if m.base == base and m.from_pml and m.additions
            ]
            found += [
                Comparison(
                    e, METHODS[base].label, difference_to_best(e, (base, *with_pml_miner), MAP)
                )
                for e in planned(preset, name, "noise30")
            ]
        return found

    test = "at 30% wrong labels, MAP@R above that of no miner and of PML's best miner"
    return [
        Claim(
            "The contextual miner helps under label noise",
            "ours",
            test,
            comparisons("context_miner"),
        ),
        Claim(
            "The contextual miner with a late start helps under label noise",
            "ours",
            test,
            comparisons("context_miner_late"),
        ),
    ]
