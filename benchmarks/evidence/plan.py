"""Everything that is declared before anything is run: methods and their search spaces, datasets,
conditions, seeds, budgets, and the comparisons that the claims come to.

A *cell* is a method on a dataset, from a start, under a condition. Each cell's setting is the best
of the same number of random trials, judged by classes (in classification: images) split off the
training data; the seeds are then run with it, and only they see the test data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from pytorch_metric_learning import losses, miners
from pytorch_metric_learning.distances import CosineSimilarity
from torch import Tensor, nn

from pml_extras.distillation import SelfDistillation, SnapshotTeacher
from pml_extras.losses import CenterContrastiveLoss, ContextualLoss
from pml_extras.miners import ContextualSimilarityMiner
from pml_extras.regularizers import ClassInterferenceRegularizer

optuna.logging.set_verbosity(optuna.logging.WARNING)

# ---- Methods. A setting is a draw from the search space; `sizes` come from the data.

Setting = dict[str, Any]
Space = dict[str, BaseDistribution]


class Sizes(NamedTuple):
    classes: int
    embedding: int
    per_class: int  # samples of a class in a batch
    batch: int

    @classmethod
    def of(cls, method: Method, classes: int, embedding: int, batch: int) -> Sizes:
        """Four samples of a class, unless there are too few classes to fill the batch so."""
        if method.square_batches:
            side = int(batch**0.5)
            return cls(classes, embedding, side, side**2)
        per_class = 4
        while per_class * classes < batch:
            per_class *= 2
        return cls(classes, embedding, per_class, batch)


@dataclass
class Parts:
    """What a training step needs beside the network."""

    loss: nn.Module
    miner: nn.Module | None = None
    miner_starts: float = 0.0  # before this share of the training there is no mining
    schedule: Callable[[float], None] | None = None  # is told the share of the training done


@dataclass(frozen=True)
class Method:
    label: str
    space: Space
    build: Callable[[Setting, Sizes], Parts]
    square_batches: bool = False  # as many classes as samples of a class
    settings: Setting = field(default_factory=dict)  # what is fixed rather than searched

    def draw(self, trial: int) -> Setting:
        """The setting of a random trial. The seed is the trial's number, so that methods whose
        spaces begin alike, as a loss's with and without an addition do, begin with the same
        values."""
        sampler = optuna.samplers.RandomSampler(seed=trial)
        study = optuna.create_study(sampler=sampler)
        return self.settings | study.ask(LR | self.space).params


def uniform(low: float, high: float) -> FloatDistribution:
    return FloatDistribution(low, high)


def log(low: float, high: float) -> FloatDistribution:
    return FloatDistribution(low, high, log=True)


LR = {"lr": log(3e-4, 1e-2)}  # of the network; Adam
PROXY_LR = {"proxy_lr": log(0.01, 3)}  # of centers and proxies; Adam too

cosine = CosineSimilarity

BASELINES = {
    "contrastive": Method(
        "Contrastive",
        {"pos_margin": uniform(0.6, 1), "neg_margin": uniform(0.2, 0.7)},
        lambda s, n: Parts(
            losses.ContrastiveLoss(s["pos_margin"], s["neg_margin"], distance=cosine())
        ),
    ),
    "triplet": Method(
        "Triplet",
        {"margin": uniform(0.05, 0.5)},
        lambda s, n: Parts(losses.TripletMarginLoss(s["margin"], distance=cosine())),
    ),
    "multi_similarity": Method(
        "MultiSimilarity + its miner",
        {"base": uniform(0.3, 0.8), "beta": log(20, 80), "epsilon": uniform(0.05, 0.3)},
        lambda s, n: Parts(
            losses.MultiSimilarityLoss(beta=s["beta"], base=s["base"]),
            miners.MultiSimilarityMiner(s["epsilon"]),
        ),
    ),
    "supcon": Method(
        "SupCon",
        {"temperature": log(0.03, 0.3)},
        lambda s, n: Parts(losses.SupConLoss(s["temperature"])),
    ),
    "ntxent": Method(
        "NTXent",
        {"temperature": log(0.03, 0.3)},
        lambda s, n: Parts(losses.NTXentLoss(s["temperature"])),
    ),
    "proxy_anchor": Method(
        "ProxyAnchor",
        {**PROXY_LR, "margin": uniform(0, 0.3), "alpha": log(8, 64)},
        lambda s, n: Parts(losses.ProxyAnchorLoss(n.classes, n.embedding, s["margin"], s["alpha"])),
    ),
    "arcface": Method(
        "ArcFace",
        {**PROXY_LR, "margin": uniform(3, 35), "scale": log(8, 64)},  # the margin in degrees
        lambda s, n: Parts(losses.ArcFaceLoss(n.classes, n.embedding, s["margin"], s["scale"])),
    ),
    "normalized_softmax": Method(
        "NormalizedSoftmax",
        {**PROXY_LR, "temperature": log(0.015, 0.15)},
        lambda s, n: Parts(losses.NormalizedSoftmaxLoss(n.classes, n.embedding, s["temperature"])),
    ),
    "smooth_ap": Method(
        "SmoothAP",
        {"temperature": log(0.005, 0.1)},
        lambda s, n: Parts(losses.SmoothAPLoss(s["temperature"])),
        # PML 2.9's is right for no other batches: it transposes its groups.
        square_batches=True,
    ),
}

# A miner is an addition to the space and to the parts.
MINERS: dict[str, tuple[str, Space, Callable[[Setting, Sizes], nn.Module]]] = {
    "ms_miner": (
        "MultiSimilarityMiner",
        {"epsilon": uniform(0.05, 0.3)},
        lambda s, n: miners.MultiSimilarityMiner(s["epsilon"]),
    ),
    "triplet_miner": (
        "TripletMarginMiner",
        {"mined_margin": uniform(0.05, 0.5)},
        lambda s, n: miners.TripletMarginMiner(s["mined_margin"], distance=cosine()),
    ),
    "context_miner": (
        "ContextualSimilarityMiner",
        {"context_margin": uniform(0, 0.4)},
        lambda s, n: ContextualSimilarityMiner(n.per_class, s["context_margin"]),
    ),
    "unfiltered_miner": (
        "ContextualSimilarityMiner(filter_noise=False)",
        {"context_margin": uniform(0, 0.4)},
        lambda s, n: ContextualSimilarityMiner(
            n.per_class, s["context_margin"], filter_noise=False
        ),
    ),
}


def mined(base: Method, miner: str) -> Method:
    label, space, build = MINERS[miner]
    return replace(
        base,
        label=f"{base.label} + {label}",
        space=base.space | space,
        build=lambda s, n: replace(base.build(s, n), miner=build(s, n)),
    )


def mined_late(base: Method) -> Method:
    """The miner judges by the neighbours, so let there be neighbours before it starts."""
    return replace(
        base,
        label=f"{base.label}, late",
        space=base.space | {"miner_starts": uniform(0.1, 0.7)},
        build=lambda s, n: replace(base.build(s, n), miner_starts=s["miner_starts"]),
    )


def distilled(base: Method) -> Method:
    # `assemble` wraps the loss, because the teacher needs the network.
    return replace(base, label=f"{base.label} + LSD", space=base.space | {"alpha_lsd": log(1, 300)})


def interfered(base: Method, **settings: Any) -> Method:
    return replace(
        base,
        label=f"{base.label} + CIR",
        space=base.space | {"strength": uniform(0.02, 0.45)},
        settings=base.settings | settings,
    )


def contextual(s: Setting, n: Sizes) -> Parts:
    """The authors' weights: what the contextual term does not take, the contrastive one does. With
    a warm-up the contextual term's weight grows to its own over that share of the training."""
    rest = 0.9  # beside the authors' 0.1 for the similarity term
    loss = ContextualLoss(
        num_neighbors=s.get("num_neighbors", n.per_class),
        neighborhood_slack=s["slack"],
        neg_margin=s["neg_margin"],
        contextual_weight=s["contextual_weight"],
        contrastive_weight=rest - s["contextual_weight"],
    )

    def schedule(progress: float) -> None:
        grown = min(progress / s["warmup"], 1.0)
        loss.contextual_weight = grown * s["contextual_weight"]
        loss.contrastive_weight = rest - loss.contextual_weight

    return Parts(loss, schedule=schedule if "warmup" in s else None)


CENTERS = {
    "scale": log(8, 64),
    "margin": uniform(0, 0.3),
    "center_weight": uniform(0, 2),
}
CONTEXT = {
    "contextual_weight": uniform(0.1, 0.9),
    "neg_margin": uniform(0.2, 0.7),
    "slack": log(0.005, 0.1),
}
OURS = {
    "center_contrastive": Method(
        "CCL",
        PROXY_LR | CENTERS,
        lambda s, n: Parts(
            CenterContrastiveLoss(
                n.classes, n.embedding, s["scale"], s["margin"], s["center_weight"]
            )
        ),
    ),
    "center_contrastive_average": Method(
        "CCL, averaged centers",
        CENTERS | {"momentum": uniform(0.3, 0.95)},
        lambda s, n: Parts(
            CenterContrastiveLoss(
                n.classes,
                n.embedding,
                s["scale"],
                s["margin"],
                s["center_weight"],
                center_update="average",
                momentum=s["momentum"],
            )
        ),
    ),
    "contextual": Method("Contextual", CONTEXT, contextual),
    "contextual_warmup": Method(
        "Contextual, warmed up", CONTEXT | {"warmup": uniform(0.1, 0.9)}, contextual
    ),
}


class SoftmaxLoss(nn.Module):
    """Plain classification: a linear layer and cross-entropy."""

    def __init__(self, num_classes: int, embedding_size: int, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.classifier = nn.Linear(embedding_size, num_classes)
        self.label_smoothing = label_smoothing

    def get_logits(self, embeddings: Tensor) -> Tensor:
        logits: Tensor = self.classifier(embeddings)
        return logits

    def forward(self, embeddings: Tensor, labels: Tensor, indices_tuple: None = None) -> Tensor:
        return nn.functional.cross_entropy(
            self.get_logits(embeddings), labels, label_smoothing=self.label_smoothing
        )


SOFTMAX = Method(
    "Cross-entropy",
    {"proxy_lr": log(3e-4, 1e-2)},
    lambda s, n: Parts(SoftmaxLoss(n.classes, n.embedding, s.get("label_smoothing", 0.0))),
)

BASELINES["triplet+ms_miner"] = mined(BASELINES["triplet"], "ms_miner")
MAIN = (*BASELINES, *OURS)
METHODS: dict[str, Method] = {
    **BASELINES,
    **OURS,
    **{f"{name}+lsd": distilled(method) for name, method in BASELINES.items()},
    "triplet+cir": interfered(BASELINES["triplet"]),
    # Miners, on the two losses that do without one.
    "contrastive+ms_miner": mined(BASELINES["contrastive"], "ms_miner"),
    "contrastive+triplet_miner": mined(BASELINES["contrastive"], "triplet_miner"),
    "contrastive+context_miner": mined(BASELINES["contrastive"], "context_miner"),
    "contrastive+unfiltered_miner": mined(BASELINES["contrastive"], "unfiltered_miner"),
    "contrastive+context_miner_late": mined_late(mined(BASELINES["contrastive"], "context_miner")),
    "triplet+triplet_miner": mined(BASELINES["triplet"], "triplet_miner"),
    "triplet+context_miner": mined(BASELINES["triplet"], "context_miner"),
    "triplet+context_miner_late": mined_late(mined(BASELINES["triplet"], "context_miner")),
    # Whether k has to be the samples per class.
    "contextual_k": replace(
        OURS["contextual"],
        label="Contextual, k of 2 to 16",
        space=CONTEXT | {"num_neighbors": CategoricalDistribution((2, 4, 8, 16))},
    ),
    # Combinations.
    "center_contrastive+lsd": distilled(OURS["center_contrastive"]),
    "center_contrastive_average+lsd": distilled(OURS["center_contrastive_average"]),
    "contextual+cir": interfered(OURS["contextual"]),
    "contextual_warmup+lsd": distilled(OURS["contextual_warmup"]),
    "contrastive+context_miner_late+lsd": distilled(
        mined_late(mined(BASELINES["contrastive"], "context_miner"))
    ),
    # Classification.
    "softmax": SOFTMAX,
    "softmax_smoothed": replace(
        SOFTMAX,
        label="Cross-entropy, label smoothing",
        space=SOFTMAX.space | {"label_smoothing": uniform(0.02, 0.3)},
    ),
    "softmax+cir": interfered(SOFTMAX, normalize=False),
}
FROM_PML = (*BASELINES, *(f"contrastive+{m}" for m in ("ms_miner", "triplet_miner")))
FROM_PML += ("triplet+triplet_miner", "softmax", "softmax_smoothed")
COMBINATIONS = (
    "center_contrastive",
    "center_contrastive+lsd",
    "center_contrastive_average",
    "center_contrastive_average+lsd",
    "contextual",
    "contextual+cir",
    "contextual_k",
    "contextual_warmup",
    "contextual_warmup+lsd",
    "contrastive+lsd",
    "supcon+lsd",
    "contrastive+context_miner",
    "contrastive+context_miner_late",
    "contrastive+context_miner_late+lsd",
)
MINED = tuple(name for name in METHODS if "_miner" in name and "lsd" not in name)
PROXY_BASED = tuple(name for name in MAIN if METHODS[name].space.keys() & {"proxy_lr", "momentum"})


def assemble(
    method: Method, setting: Setting, sizes: Sizes, network: nn.Module, num_epochs: int
) -> Parts:
    """The method's parts, with what is put around the loss."""
    parts = method.build(setting, sizes)
    if "strength" in setting:
        ClassInterferenceRegularizer(
            sizes.classes,
            sizes.embedding,
            strength=setting["strength"],
            normalize=setting.get("normalize", True),
        ).attach(parts.loss)
    if "alpha_lsd" in setting:
        teacher = SnapshotTeacher(network)
        parts.loss = SelfDistillation(parts.loss, teacher, num_epochs, setting["alpha_lsd"])
    return parts


# ---- Datasets and conditions.


@dataclass(frozen=True)
class Dataset:
    label: str
    source: str  # its name in examples/datasets.py
    classification: bool = False  # the test images are of the training classes
    few_shot: bool = False  # measure episodes, too


DATASETS = {
    "omniglot": Dataset("Omniglot", "omniglot", few_shot=True),
    "cifar100": Dataset("CIFAR-100", "cifar100"),
    "cifar100_classes": Dataset("CIFAR-100, classification", "cifar100", classification=True),
    "digits": Dataset("digits", "digits"),  # needs no files; for trying things out
}
STARTS = {
    "scratch": "from scratch",
    "finetune": "fine-tuned: one half of the training classes after NormalizedSoftmax on the other",
}
PRETRAINING: Setting = {"lr": 3e-3, "proxy_lr": 0.1, "temperature": 0.05}


@dataclass(frozen=True)
class Condition:
    label: str
    noise: float = 0.0  # share of the training labels made wrong
    withheld: float = 0.0  # share of each training class's images left out
    imbalance: float = 1.0  # images of the largest class to those of the smallest
    tuned_on: str = "clean"  # the condition whose trials choose the setting


CONDITIONS = {
    "clean": Condition("clean"),
    "noise10": Condition("10% wrong labels", noise=0.1, tuned_on="noise30"),
    "noise30": Condition("30% wrong labels", noise=0.3, tuned_on="noise30"),
    "noise50": Condition("50% wrong labels", noise=0.5, tuned_on="noise30"),
    "withheld50": Condition("50% of the images withheld", withheld=0.5),
    "withheld75": Condition("75% of the images withheld", withheld=0.75),
    # With as many samples of each class in a batch there would be nothing left to balance: here
    # batches are drawn as the images come.
    "long_tail": Condition("long-tailed classes", imbalance=20.0, tuned_on="long_tail"),
}
NOISE = ("noise10", "noise30", "noise50")
WITHHELD = ("withheld50", "withheld75")


class Cell(NamedTuple):
    dataset: str
    start: str
    condition: str
    method: str

    @property
    def tuned(self) -> Cell:
        return self._replace(condition=CONDITIONS[self.condition].tuned_on)

    @property
    def reranked(self) -> bool:
        """Whether to measure re-ranking too, which takes longer than the test without it."""
        main = self.condition == "clean" and self.method in MAIN
        combined = self.condition in ("clean", "noise30") and self.method in COMBINATIONS
        return (
            self.start == "scratch"
            and not DATASETS[self.dataset].classification
            and (main or combined)
        )


# ---- How much is run.


class Block(NamedTuple):
    """Every combination of these."""

    datasets: tuple[str, ...]
    starts: tuple[str, ...]
    conditions: tuple[str, ...]
    methods: tuple[str, ...]

    def cells(self) -> Iterator[Cell]:
        for dataset in self.datasets:
            for start in self.starts:
                for condition in self.conditions:
                    for method in self.methods:
                        yield Cell(dataset, start, condition, method)


@dataclass(frozen=True)
class Budget:
    """The same for every method. An epoch is a number of steps, whatever the condition leaves of
    the images, so that conditions differ in what is seen and not in how long it is looked at."""

    epochs: int
    steps: int  # an epoch
    batch_size: int
    width: int  # channels of the convolutions
    shrink: bool  # whether the network starts by folding 2 x 2 pixels into channels
    pretraining_epochs: int
    embedding_size: int = 64


@dataclass(frozen=True)
class Preset:
    budget: Budget
    trials: int
    seeds: int
    blocks: dict[str, Block]

    def cells(self, block: str | None = None) -> list[Cell]:
        """In the order in which they are run; each once."""
        names = [block] if block else self.blocks
        return list(dict.fromkeys(cell for name in names for cell in self.blocks[name].cells()))

    def describe(self) -> dict[str, Any]:
        return asdict(self.budget)


def blocks(datasets: tuple[str, ...], **others: Block) -> dict[str, Block]:
    distilled_pairs = tuple(f"{name}{lsd}" for name in BASELINES for lsd in ("", "+lsd"))
    return {
        "clean": Block(datasets, ("scratch",), ("clean",), MAIN),
        "finetune": Block(datasets, ("finetune",), ("clean",), MAIN),
        "few_shot": Block(("omniglot",), ("scratch",), ("clean",), ("triplet", "triplet+cir")),
        "classes": Block(
            ("cifar100_classes",),
            ("scratch",),
            ("clean",),
            ("softmax", "softmax_smoothed", "softmax+cir"),
        ),
        "long_tail": Block(("omniglot",), ("scratch",), ("long_tail",), PROXY_BASED),
        "noise": Block(datasets, ("scratch",), NOISE, MAIN),
        "miner": Block(datasets, ("scratch",), ("noise30",), ("contrastive", "triplet", *MINED)),
        "distillation": Block(datasets, ("scratch",), ("clean",), distilled_pairs),
        "withheld": Block(datasets, ("scratch",), WITHHELD, MAIN),
        "combinations": Block(datasets, ("scratch",), ("clean", "noise30"), COMBINATIONS),
        **others,
    }


BOTH = ("omniglot", "cifar100")
OMNIGLOT, CIFAR100 = ("omniglot",), ("cifar100",)
SCRATCH = ("scratch",)
PRESETS = {
    # Two CPU cores, about two hours: fewer levels of noise and withholding, fewer combinations, and
    # CIFAR-100 from scratch only.
    "small": Preset(
        Budget(epochs=5, steps=50, batch_size=64, width=32, shrink=True, pretraining_epochs=4),
        trials=6,
        seeds=5,
        blocks=blocks(
            BOTH,
            finetune=Block(OMNIGLOT, ("finetune",), ("clean",), MAIN),
            noise=Block(OMNIGLOT, SCRATCH, ("noise30", "noise50"), MAIN),
            noise_cifar100=Block(CIFAR100, SCRATCH, ("noise30",), MAIN),
            withheld=Block(BOTH, SCRATCH, ("withheld75",), MAIN),
            combinations=Block(OMNIGLOT, SCRATCH, ("clean", "noise30"), COMBINATIONS),
        ),
    ),
    # A GPU.
    "full": Preset(
        Budget(epochs=30, steps=100, batch_size=128, width=64, shrink=False, pretraining_epochs=20),
        trials=20,
        seeds=10,
        blocks=blocks(
            BOTH,
            finetune_noise=Block(BOTH, ("finetune",), NOISE, (*MAIN, *MINED)),
            finetune_distillation=Block(
                BOTH, ("finetune",), ("clean",), tuple(f"{name}+lsd" for name in BASELINES)
            ),
        ),
    ),
    # A minute, and no files: to see that everything works.
    "smoke": Preset(
        Budget(epochs=2, steps=3, batch_size=64, width=4, shrink=False, pretraining_epochs=1),
        trials=2,
        seeds=2,
        blocks={
            "clean": Block(
                ("digits",), ("scratch", "finetune"), ("clean",), ("contrastive", "contextual")
            ),
            "noise": Block(
                ("digits",), ("scratch",), ("noise30",), ("contrastive", "contextual_warmup")
            ),
        },
    ),
}
TRIAL_SEED = 1000  # of every trial: settings differ by nothing else, and by no seed of a table


# ---- Claims, and what they come to. `Scores` gives a cell's test scores by seed.

MAP = "map_at_r"
P1 = "precision_at_1"
FEW_SHOT = tuple(f"{ways}-way {shots}-shot" for ways in (5, 20) for shots in (1, 5))
RERANKED = "reranked_map_at_r"
RARE = "rare_map_at_r"
ACCURACY = "accuracy"

BySeed = dict[int, float]
Scores = Callable[[Cell, str], BySeed]  # raises NotRunError where a seed is missing


class NotRunError(Exception):
    """Some of the runs that a comparison needs are missing."""


@dataclass(frozen=True)
class Comparison:
    """Differences by seed, whose 95% interval is to lie above a threshold."""

    label: str
    differences: Callable[[Scores], list[float]]
    threshold: float = 0.0
    unit: str = "points"  # hundredths; or epochs


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


def re_ranked(dataset: str) -> Callable[[Scores], list[float]]:
    """The mean over the methods: what is compared are seeds."""

    def differences(scores: Scores) -> list[float]:
        cells = [Cell(dataset, "scratch", "clean", name) for name in MAIN]
        by_method = [minus(scores(c, RERANKED), scores(c, MAP)) for c in cells]
        return [sum(column) / len(cells) for column in zip(*by_method, strict=True)]

    return differences


def claims(preset: Preset) -> list[Claim]:
    """The claims, with the comparisons that the preset has cells for."""
    planned = set(preset.cells())
    datasets = [name for name in BOTH if any(cell.dataset == name for cell in planned)]
    baselines = tuple(BASELINES)

    def label(cell: Cell, *more: str) -> str:
        shown = [DATASETS[cell.dataset].label]
        if cell.start != "scratch":
            shown.append("fine-tuned")
        if cell.condition != "clean":
            shown.append(CONDITIONS[cell.condition].label)
        return ", ".join([*shown, *more])

    def centers(method: str) -> list[Comparison]:
        found = []
        for dataset in datasets:
            for start in STARTS:
                cell = Cell(dataset, start, "clean", method)
                if cell not in planned:
                    continue
                for metric, name in ((P1, "R@1"), (MAP, "MAP@R")):
                    found.append(Comparison(label(cell, name), above_best(cell, baselines, metric)))
                found.append(
                    Comparison(
                        label(cell, "half the epochs"),
                        in_half_the_epochs(cell, baselines),
                        threshold=-0.01,  # exactly half will do
                        unit="epochs",
                    )
                )
        return found

    def robust(method: str) -> list[Comparison]:
        found = []
        for dataset in datasets:
            for levels in (NOISE, WITHHELD):
                cells = [Cell(dataset, "scratch", level, method) for level in levels]
                cells = [cell for cell in cells if cell in planned]
                if cells:  # the hardest level
                    cell = cells[-1]
                    found += [
                        Comparison(label(cell, "margin"), above_best(cell, baselines, MAP)),
                        Comparison(label(cell, "growth of the margin"), grows(cell, baselines)),
                    ]
        return found

    def miner(name: str) -> list[Comparison]:
        found = []
        for dataset in datasets:
            for base in ("contrastive", "triplet"):
                cell = Cell(dataset, "scratch", "noise30", f"{base}+{name}")
                others = (base, f"{base}+ms_miner", f"{base}+triplet_miner")
                found.append(
                    Comparison(label(cell, METHODS[base].label), above_best(cell, others, MAP))
                )
        return found

    few_shot = Cell("omniglot", "scratch", "clean", "triplet+cir")
    classes = Cell("cifar100_classes", "scratch", "clean", "softmax+cir")
    long_tail = Cell("omniglot", "scratch", "long_tail", "center_contrastive")
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
        Claim(
            "CCL re-balances classes",
            "2308.00458",
            "MAP@R on unseen classes of the rare alphabets above ProxyAnchor's",
            [
                Comparison(
                    label(long_tail, "rare alphabets"),
                    with_and_without(long_tail, "proxy_anchor", RARE),
                )
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
                Comparison(
                    f"{DATASETS[dataset].label}, {METHODS[name].label}",
                    with_and_without(Cell(dataset, "scratch", "clean", f"{name}+lsd"), name, MAP),
                )
                for dataset in datasets
                for name in baselines
            ],
        ),
        Claim(
            "CIR improves few-shot recognition with the triplet loss",
            "2009.02396",
            "with against without, on unseen Omniglot classes",
            [
                Comparison(episode, with_and_without(few_shot, "triplet", episode))
                for episode in FEW_SHOT
            ],
        ),
        Claim(
            "CIR is on par with label smoothing in classification",
            "2009.02396",
            "accuracy at most half a point below label smoothing's",
            [
                Comparison(
                    "CIFAR-100",
                    with_and_without(classes, "softmax_smoothed", ACCURACY),
                    threshold=-0.005,
                )
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
            [Comparison(DATASETS[dataset].label, re_ranked(dataset)) for dataset in datasets],
        ),
    ]
    return [claim for claim in all_claims if claim.comparisons and datasets]


# What others published, to stand beside a run of `--protocol`: R@1 in percent, by image size.
PUBLISHED: dict[str, dict[str, list[tuple[int | None, float, str]]]] = {
    "center_contrastive": {
        "cub": [(None, 73.45, "2308.00458, ResNet-50")],
        "cars196": [(None, 91.02, "2308.00458, ResNet-50")],
        "sop": [(None, 83.10, "2308.00458, ResNet-50")],
    },
    "contextual": {
        "cub": [(256, 68.7, "2210.01908, ResNet-50, 512-d"), (224, 71.9, "2210.01908")],
        "cars196": [(256, 89.3, "2210.01908, ResNet-50, 512-d"), (224, 91.1, "2210.01908")],
        "sop": [(256, 83.3, "2210.01908, ResNet-50, 512-d")],
    },
}
