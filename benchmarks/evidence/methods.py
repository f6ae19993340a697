"""All methods that are compared, by the name that the result lines use.

A method is a base loss or a variation of another method: with an addition (a miner,
self-distillation or class interference), with other batches, or with label filtering.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from optuna.distributions import CategoricalDistribution
from pytorch_metric_learning import miners
from pytorch_metric_learning.distances import CosineSimilarity
from torch import nn

from pml_extras.miners import ContextualSimilarityMiner

from .components import Hparams, Method, Sizes, Space, log_uniform, uniform
from .losses import CONTEXTUAL_SPACE, OURS, PML_LOSSES, SOFTMAX, by_name


@dataclass(frozen=True)
class Miner:
    label: str
    space: Space
    build: Callable[[Hparams, Sizes], nn.Module]
    from_pml: bool = False


def build_contextual_miner(h: Hparams, s: Sizes, **options: Any) -> nn.Module:
    return ContextualSimilarityMiner(
        num_neighbors=s.samples_per_class, margin=h["context_margin"], **options
    )


MINERS = {
    "ms_miner": Miner(
        "MultiSimilarityMiner",
        {"epsilon": uniform(0.05, 0.3)},
        lambda h, s: miners.MultiSimilarityMiner(h["epsilon"]),
        from_pml=True,
    ),
    "triplet_miner": Miner(
        "TripletMarginMiner",
        {"mined_margin": uniform(0.05, 0.5)},
        lambda h, s: miners.TripletMarginMiner(h["mined_margin"], distance=CosineSimilarity()),
        from_pml=True,
    ),
    "context_miner": Miner(
        "ContextualSimilarityMiner", {"context_margin": uniform(0, 0.4)}, build_contextual_miner
    ),
    "unfiltered_miner": Miner(
        "ContextualSimilarityMiner(filter_noise=False)",
        {"context_margin": uniform(0, 0.4)},
        lambda h, s: build_contextual_miner(h, s, filter_noise=False),
    ),
    # The miner judges by the neighbors, so it may help to train without it first.
    "context_miner_late": Miner(
        "ContextualSimilarityMiner, late start",
        {"context_margin": uniform(0, 0.4), "miner_start": uniform(0.1, 0.7)},
        build_contextual_miner,
    ),
}


# ---- Variations.


def with_addition(base: Method, addition: str, label: str, space: Space, **changes: Any) -> Method:
    return replace(
        base,
        name=f"{base.name}+{addition}",
        label=f"{base.label} + {label}",
        base=base.name,
        space=base.space | space,
        additions=(*base.additions, addition),
        **{"from_pml": False} | changes,
    )


def with_miner(base: Method, name: str) -> Method:
    miner = MINERS[name]
    from_pml = base.from_pml and miner.from_pml
    return with_addition(
        base, name, miner.label, miner.space, build_miner=miner.build, from_pml=from_pml
    )


def with_lsd(base: Method) -> Method:
    return with_addition(base, "lsd", "LSD", {"alpha_lsd": log_uniform(1, 300)})


def with_low_temperature_lsd(base: Method) -> Method:
    """At the authors' temperature of 1 the teacher's distribution is nearly uniform."""
    space = {"temperature_lsd": log_uniform(0.03, 0.3), "alpha_lsd": log_uniform(0.1, 30)}
    return with_addition(base, "lsd_low_temperature", "LSD at low temperature", space)


def with_cir(base: Method, **fixed: Any) -> Method:
    space: Space = {"strength": uniform(0.02, 0.45)}
    return with_addition(base, "cir", "CIR", space, fixed=base.fixed | fixed)


def with_batches(base: Method, batches: Literal["square", "random"]) -> Method:
    return replace(
        base,
        name=f"{base.name}_{batches}",
        label=f"{base.label}, {batches} batches",
        base=base.name,
        batches=batches,
    )


def with_label_filter(base: Method) -> Method:
    return replace(
        base,
        name=f"{base.name}_label_filtered",
        label=f"{base.label}, label filtering",
        base=base.name,
        label_filtered=True,
        from_pml=False,
    )


LATE_MINER = with_miner(PML_LOSSES["contrastive"], "context_miner_late")
BASELINES = PML_LOSSES | by_name(with_miner(PML_LOSSES["triplet"], "ms_miner"))
MAIN = BASELINES | OURS
METHODS = by_name(
    *MAIN.values(),
    *(with_lsd(method) for method in BASELINES.values()),
    *(with_low_temperature_lsd(BASELINES[name]) for name in ("supcon", "multi_similarity")),
    with_cir(BASELINES["triplet"]),
    # Miners, on the two losses that have none of their own.
    *(
        with_miner(BASELINES["contrastive"], miner)
        for miner in ("ms_miner", "triplet_miner", "context_miner", "unfiltered_miner")
    ),
    LATE_MINER,
    *(
        with_miner(BASELINES["triplet"], miner)
        for miner in ("triplet_miner", "context_miner", "context_miner_late")
    ),
    # Whether k has to be the number of samples per class in a batch.
    replace(
        OURS["contextual"],
        name="contextual_k",
        base="contextual",
        label="Contextual, k of 2 to 16",
        space=CONTEXTUAL_SPACE | {"num_neighbors": CategoricalDistribution((2, 4, 8, 16))},
    ),
    # Combinations.
    with_lsd(OURS["center_contrastive"]),
    with_lsd(OURS["center_contrastive_ema"]),
    with_cir(OURS["contextual"]),
    with_lsd(OURS["contextual_warmup"]),
    with_lsd(LATE_MINER),
    # Fewer classes per batch, and more samples of each: is it the method or the batch?
    *(
        with_batches(MAIN[name], "square")
        for name in (
            "contrastive",
            "supcon",
            "multi_similarity",
            "center_contrastive_ema",
            "contextual",
        )
    ),
    # Losses with proxies or centers need no positive pairs, so they can use random batches.
    *(with_batches(method, "random") for method in MAIN.values() if method.proxy_based),
    *(with_label_filter(BASELINES[name]) for name in ("supcon", "ntxent", "smooth_ap")),
    # Classification.
    SOFTMAX,
    replace(
        SOFTMAX,
        name="softmax_smoothed",
        base="softmax",
        label="Cross-entropy, label smoothing",
        space=SOFTMAX.space | {"label_smoothing": uniform(0.02, 0.3)},
    ),
    with_cir(SOFTMAX, normalize=False),
)


# ---- Groups of methods. A variation is listed with the method that it is a variation of.


def names_of(condition: Callable[[Method], bool]) -> tuple[str, ...]:
    return tuple(name for name, method in METHODS.items() if condition(method))


def with_last_addition(addition: str) -> dict[str, str]:
    return {n: m.base for n, m in METHODS.items() if m.base and m.additions[-1:] == (addition,)}


def with_other_batches(batches: str) -> dict[str, str]:
    return {
        name: method.base
        for name, method in METHODS.items()
        if method.base and method.batches == batches != METHODS[method.base].batches
    }


PROXY_BASED = tuple(name for name, method in MAIN.items() if method.proxy_based)
MINED = names_of(lambda m: m.additions != () and set(m.additions) <= MINERS.keys())
RANDOM_BATCHES = with_other_batches("random")
SQUARE_BATCHES = with_other_batches("square")
LABEL_FILTERED = {n: m.base for n, m in METHODS.items() if m.base and m.label_filtered}
CLASSIFIERS = ("softmax", "softmax_smoothed", "softmax+cir")
COMBINATIONS = (
    "center_contrastive",
    "center_contrastive+lsd",
    "center_contrastive_ema",
    "center_contrastive_ema+lsd",
    "contextual",
    "contextual+cir",
    "contextual_k",
    "contextual_warmup",
    "contextual_warmup+lsd",
    "multi_similarity",
    "multi_similarity+lsd",
    "contrastive+lsd",
    "supcon+lsd",
    "smooth_ap",
    "smooth_ap_label_filtered",
    "ntxent_label_filtered",
    "contrastive+context_miner",
    "contrastive+context_miner_late",
    "contrastive+context_miner_late+lsd",
)
