"""The base losses that are compared: PML's, ours, and plain classification."""

from __future__ import annotations

from typing import Any

from pytorch_metric_learning import losses, miners
from pytorch_metric_learning.distances import CosineSimilarity
from torch import Tensor, nn

from pml_extras.losses import CenterContrastiveLoss, ContextualLoss

from .components import Hparams, Method, Sizes, Space, log_uniform, uniform


def by_name(*methods: Method) -> dict[str, Method]:
    return {method.name: method for method in methods}


PROXY_LR: Space = {"proxy_lr": log_uniform(0.01, 3)}  # of centers and proxies; Adam


# ---- PML's losses.

cosine = CosineSimilarity

PML_LOSSES = by_name(
    Method(
        "contrastive",
        "Contrastive",
        {"pos_margin": uniform(0.6, 1), "neg_margin": uniform(0.2, 0.7)},
        lambda h, s: losses.ContrastiveLoss(h["pos_margin"], h["neg_margin"], distance=cosine()),
        from_pml=True,
    ),
    Method(
        "triplet",
        "Triplet",
        {"margin": uniform(0.05, 0.5)},
        lambda h, s: losses.TripletMarginLoss(h["margin"], distance=cosine()),
        from_pml=True,
    ),
    Method(
        "multi_similarity",
        "MultiSimilarity + its miner",
        {"base": uniform(0.3, 0.8), "beta": log_uniform(20, 80), "epsilon": uniform(0.05, 0.3)},
        lambda h, s: losses.MultiSimilarityLoss(beta=h["beta"], base=h["base"]),
        lambda h, s: miners.MultiSimilarityMiner(h["epsilon"]),
        from_pml=True,
    ),
    Method(
        "supcon",
        "SupCon",
        {"temperature": log_uniform(0.03, 0.3)},
        lambda h, s: losses.SupConLoss(h["temperature"]),
        from_pml=True,
    ),
    Method(
        "ntxent",
        "NTXent",
        {"temperature": log_uniform(0.03, 0.3)},
        lambda h, s: losses.NTXentLoss(h["temperature"]),
        from_pml=True,
    ),
    Method(
        "proxy_anchor",
        "ProxyAnchor",
        {**PROXY_LR, "margin": uniform(0, 0.3), "alpha": log_uniform(8, 64)},
        lambda h, s: losses.ProxyAnchorLoss(
            s.num_classes, s.embedding_size, h["margin"], h["alpha"]
        ),
        from_pml=True,
        proxy_based=True,
    ),
    Method(
        "arcface",
        "ArcFace",
        {**PROXY_LR, "margin": uniform(3, 35), "scale": log_uniform(8, 64)},  # margin in degrees
        lambda h, s: losses.ArcFaceLoss(s.num_classes, s.embedding_size, h["margin"], h["scale"]),
        from_pml=True,
        proxy_based=True,
    ),
    Method(
        "normalized_softmax",
        "NormalizedSoftmax",
        {**PROXY_LR, "temperature": log_uniform(0.015, 0.15)},
        lambda h, s: losses.NormalizedSoftmaxLoss(
            s.num_classes, s.embedding_size, h["temperature"]
        ),
        from_pml=True,
        proxy_based=True,
    ),
    Method(
        "smooth_ap",
        "SmoothAP",
        {"temperature": log_uniform(0.005, 0.1)},
        lambda h, s: losses.SmoothAPLoss(h["temperature"]),
        from_pml=True,
        # PML 2.9 transposes the groups of a batch, so only square batches give the right loss.
        batches="square",
    ),
)


# ---- Our losses.


def build_center_contrastive(h: Hparams, s: Sizes, **options: Any) -> nn.Module:
    return CenterContrastiveLoss(
        s.num_classes,
        s.embedding_size,
        scale=h["scale"],
        margin=h["margin"],
        center_weight=h["center_weight"],
        negative_classes="all",
        **options,
    )


SIMILARITY_WEIGHT = 0.1  # of the contextual loss, as the authors have it
OTHER_WEIGHTS = 1 - SIMILARITY_WEIGHT  # the contextual and the contrastive weight add up to this


def build_contextual(h: Hparams, s: Sizes) -> nn.Module:
    return ContextualLoss(
        num_neighbors=h.get("num_neighbors", s.samples_per_class),
        neighborhood_slack=h["slack"],
        neg_margin=h["neg_margin"],
        contextual_weight=h["contextual_weight"],
        contrastive_weight=OTHER_WEIGHTS - h["contextual_weight"],
        similarity_weight=SIMILARITY_WEIGHT,
    )


def warm_up_contextual(loss: Any, hparams: Hparams, progress: float) -> None:
    """Increase the contextual weight linearly over the first `warmup` of the training."""
    loss.contextual_weight = min(progress / hparams["warmup"], 1.0) * hparams["contextual_weight"]
    loss.contrastive_weight = OTHER_WEIGHTS - loss.contextual_weight


CENTER_SPACE: Space = {
    "scale": log_uniform(8, 64),
    "margin": uniform(0, 0.3),
    "center_weight": uniform(0, 2),
}
CONTEXTUAL_SPACE: Space = {
    "contextual_weight": uniform(0.1, 0.9),
    "neg_margin": uniform(0.2, 0.7),
    "slack": log_uniform(0.005, 0.1),
}
OURS = by_name(
    Method(
        "center_contrastive",
        "CCL",
        PROXY_LR | CENTER_SPACE,
        build_center_contrastive,
        proxy_based=True,
    ),
    Method(
        "center_contrastive_ema",
        "CCL, EMA centers",
        CENTER_SPACE | {"momentum": uniform(0.3, 0.95)},
        lambda h, s: build_center_contrastive(h, s, center_update="ema", momentum=h["momentum"]),
        proxy_based=True,
    ),
    Method("contextual", "Contextual", CONTEXTUAL_SPACE, build_contextual),
    Method(
        "contextual_warmup",
        "Contextual, warm-up",
        CONTEXTUAL_SPACE | {"warmup": uniform(0.1, 0.9)},
        build_contextual,
        schedule=warm_up_contextual,
    ),
)


# ---- Classification.


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
    "softmax",
    "Cross-entropy",
    {"proxy_lr": log_uniform(3e-4, 1e-2)},
    lambda h, s: SoftmaxLoss(s.num_classes, s.embedding_size, h.get("label_smoothing", 0.0)),
    from_pml=True,
)
