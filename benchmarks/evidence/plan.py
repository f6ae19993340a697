"""Everything that is declared before anything is run: methods and their search spaces, datasets,
conditions, seeds, budgets. The comparisons that the claims come to are in `claims.py`.

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
    random_batches: bool = False  # drawn as the images come, not some of each class
    cleaned: bool = False  # after each epoch, leave out what `LabelNoiseDetector` distrusts
    tuned_as: str | None = None  # the method whose trials choose the setting, if not its own
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
        lambda s, n: ContextualSimilarityMiner(
            num_neighbors=n.per_class, margin=s["context_margin"]
        ),
    ),
    "unfiltered_miner": (
        "ContextualSimilarityMiner(filter_noise=False)",
        {"context_margin": uniform(0, 0.4)},
        lambda s, n: ContextualSimilarityMiner(
            num_neighbors=n.per_class, margin=s["context_margin"], filter_noise=False
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


def squared(base: Method) -> Method:
    return replace(base, label=f"{base.label}, square batches", square_batches=True)


def at_random(base: Method) -> Method:
    return replace(base, label=f"{base.label}, random batches", random_batches=True)


def cleaned(name: str) -> Method:
    base = BASELINES[name]  # there is nothing else to tune
    label = f"{base.label}, without distrusted labels"
    return replace(base, label=label, cleaned=True, tuned_as=name)


def distilled(base: Method) -> Method:
    # `assemble` wraps the loss, because the teacher needs the network.
    return replace(base, label=f"{base.label} + LSD", space=base.space | {"alpha_lsd": log(1, 300)})


def distilled_sharply(base: Method) -> Method:
    """At the authors' temperature of 1 what the teacher says is nearly uniform."""
    sharp = {"temperature_lsd": log(0.03, 0.3), "alpha_lsd": log(0.1, 30)}
    return replace(base, label=f"{base.label} + sharp LSD", space=base.space | sharp)


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
                n.classes,
                n.embedding,
                scale=s["scale"],
                margin=s["margin"],
                center_weight=s["center_weight"],
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
                scale=s["scale"],
                margin=s["margin"],
                center_weight=s["center_weight"],
                center_update="ema",
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

PROXY_BASED = tuple(
    name
    for name, method in (BASELINES | OURS).items()
    if method.space.keys() & {"proxy_lr", "momentum"}
)
SHARP = ("supcon", "multi_similarity")
SQUARED = ("contrastive", "supcon", "multi_similarity", "center_contrastive_average", "contextual")
BASELINES["triplet+ms_miner"] = mined(BASELINES["triplet"], "ms_miner")
MAIN = (*BASELINES, *OURS)
METHODS: dict[str, Method] = {
    **BASELINES,
    **OURS,
    **{f"{name}+lsd": distilled(method) for name, method in BASELINES.items()},
    **{f"{name}+lsd_sharp": distilled_sharply(BASELINES[name]) for name in SHARP},
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
    # Whether it is the method or the batch: fewer classes, and more samples of each.
    **{f"{name}_square": squared((BASELINES | OURS)[name]) for name in SQUARED},
    # These need no two images of a class, so a batch may show as many classes as it has images.
    **{f"{name}_random": at_random((BASELINES | OURS)[name]) for name in PROXY_BASED},
    # What `LabelNoiseDetector` is worth while training.
    **{f"{name}_cleaned": cleaned(name) for name in ("supcon", "ntxent", "smooth_ap")},
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
FROM_PML += tuple(f"{name}_square" for name in SQUARED if name in BASELINES)
FROM_PML += tuple(f"{name}_random" for name in PROXY_BASED if name in BASELINES)
AT_RANDOM = tuple(f"{name}_random" for name in PROXY_BASED)
BATCHES = (*AT_RANDOM, *(f"{name}_square" for name in SQUARED))
CLEANED = tuple(name for name in METHODS if name.endswith("_cleaned"))
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
    "multi_similarity",
    "multi_similarity+lsd",
    "contrastive+lsd",
    "supcon+lsd",
    "smooth_ap",
    "smooth_ap_cleaned",
    "ntxent_cleaned",
    "contrastive+context_miner",
    "contrastive+context_miner_late",
    "contrastive+context_miner_late+lsd",
)
CLASSIFIERS = ("softmax", "softmax_smoothed", "softmax+cir")
MINED = tuple(name for name in METHODS if "_miner" in name and "lsd" not in name)


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
        parts.loss = SelfDistillation(
            parts.loss,
            teacher,
            num_epochs,
            alpha=setting["alpha_lsd"],
            temperature=setting.get("temperature_lsd", 1.0),
        )
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
STARTS = {"scratch": "from scratch", "finetune": "fine-tuned"}
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
        method = METHODS[self.method].tuned_as or self.method
        return self._replace(condition=CONDITIONS[self.condition].tuned_on, method=method)

    @property
    def drawn_by_class(self) -> bool:
        """Or as the images come."""
        long_tailed = CONDITIONS[self.condition].imbalance > 1
        return not (DATASETS[self.dataset].classification or long_tailed)

    @property
    def reranked(self) -> bool:
        """Whether to measure re-ranking too, which takes longer than the test without it."""
        main = self.condition == "clean" and self.method in MAIN
        combined = (
            self.start == "scratch"
            and self.condition in ("clean", "noise30")
            and self.method in COMBINATIONS
        )
        return not DATASETS[self.dataset].classification and (main or combined)


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


BOTH = ("omniglot", "cifar100")
OMNIGLOT, CIFAR100 = ("omniglot",), ("cifar100",)
SCRATCH = ("scratch",)


def claimed(
    start: str, noise: tuple[str, ...] = NOISE, withheld: tuple[str, ...] = WITHHELD
) -> dict[str, Block]:
    """What the claims compare."""
    starts, clean = (start,), ("clean",)
    blocks = {
        "clean": Block(BOTH, starts, clean, MAIN),
        "few_shot": Block(OMNIGLOT, starts, clean, ("triplet", "triplet+cir")),
        "classes": Block(("cifar100_classes",), starts, clean, CLASSIFIERS),
        "long_tail": Block(OMNIGLOT, starts, ("long_tail",), PROXY_BASED),
        "distillation": Block(BOTH, starts, clean, tuple(f"{name}+lsd" for name in BASELINES)),
        "noise": Block(BOTH, starts, noise, MAIN),
        "miner": Block(BOTH, starts, ("noise30",), MINED),
        "withheld": Block(BOTH, starts, withheld, MAIN),
    }
    return {name if start == "scratch" else f"{name}_{start}": b for name, b in blocks.items()}


SMALL = Budget(epochs=5, steps=50, batch_size=64, width=32, shrink=True, pretraining_epochs=4)
SHARPLY = tuple(f"{name}+lsd_sharp" for name in SHARP)
PRESETS = {
    # The claims at one level of noise and of withholding. About two hours each on two CPU cores.
    "small": Preset(
        SMALL, trials=6, seeds=5, blocks=claimed("scratch", ("noise30",), ("withheld75",))
    ),
    "small-finetuned": Preset(
        SMALL, trials=6, seeds=5, blocks=claimed("finetune", ("noise30",), ("withheld75",))
    ),
    # What the mechanisms suggest, and what pays together.
    "small-explored": Preset(
        SMALL,
        trials=6,
        seeds=5,
        blocks={
            "combinations": Block(OMNIGLOT, SCRATCH, ("clean", "noise30"), COMBINATIONS),
            "batches": Block(OMNIGLOT, SCRATCH, ("clean", "noise30"), BATCHES),
            "batches_cifar100": Block(CIFAR100, SCRATCH, ("clean",), AT_RANDOM),
            "cleaned": Block(OMNIGLOT, SCRATCH, ("noise30", "noise50"), CLEANED),
            "cleaned_cifar100": Block(CIFAR100, SCRATCH, ("clean", "noise30"), CLEANED),
            "cleaned_finetune": Block(BOTH, ("finetune",), ("noise30",), CLEANED),
            "noise50": Block(OMNIGLOT, SCRATCH, ("noise50",), MAIN),
            "sharp": Block(BOTH, SCRATCH, ("clean",), SHARPLY),
            "batches_finetune": Block(BOTH, ("finetune",), ("clean",), AT_RANDOM),
        },
    ),
    # The small one's network, four times as long: who only wants more steps. Proxies in the batches
    # that suit them.
    "long": Preset(
        Budget(epochs=10, steps=100, batch_size=64, width=32, shrink=True, pretraining_epochs=4),
        trials=6,
        seeds=5,
        blocks={
            "clean": Block(
                OMNIGLOT,
                SCRATCH,
                ("clean",),
                (
                    *("multi_similarity", "supcon", "contextual", "contextual_warmup"),
                    *AT_RANDOM,
                ),
            )
        },
    ),
    # A GPU.
    "full": Preset(
        Budget(epochs=30, steps=100, batch_size=128, width=64, shrink=False, pretraining_epochs=20),
        trials=20,
        seeds=10,
        blocks={
            **claimed("scratch"),
            **claimed("finetune"),
            "combinations": Block(BOTH, SCRATCH, ("clean", "noise30"), COMBINATIONS),
            "batches": Block(BOTH, tuple(STARTS), ("clean", "noise30"), BATCHES),
            "cleaned": Block(BOTH, tuple(STARTS), NOISE, CLEANED),
            "sharp": Block(BOTH, SCRATCH, ("clean",), SHARPLY),
        },
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


def whole(name: str) -> tuple[str, Preset]:
    """Runs of one budget are comparable. So the presets with the budget of the named one share a
    file of results and a page: the first's name, and all that they run."""
    alike = {n: p for n, p in PRESETS.items() if p.budget == PRESETS[name].budget}
    blocks = {block: b for preset in alike.values() for block, b in preset.blocks.items()}
    first = next(iter(alike))
    return first, replace(PRESETS[first], blocks=blocks)


TRIAL_SEED = 1000  # of every trial: settings differ by nothing else, and by no seed of a table


# ---- What is measured.

MAP = "map_at_r"
P1 = "precision_at_1"
FEW_SHOT = tuple(f"{ways}-way {shots}-shot" for ways in (5, 20) for shots in (1, 5))
RERANKED = "reranked_map_at_r"
RARE = "rare_map_at_r"
ACCURACY = "accuracy"
