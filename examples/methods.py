"""The losses, miners and teachers that the command line offers, by name."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from images import UserError
from pytorch_metric_learning import losses, miners
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.samplers import MPerClassSampler
from pytorch_metric_learning.utils.common_functions import get_labels_to_indices
from torch import nn

from pml_extras.distillation import EMATeacher, SelfDistillation, SnapshotTeacher
from pml_extras.label_noise import LabelNoiseDetector
from pml_extras.losses import CenterContrastiveLoss, ContextualLoss
from pml_extras.miners import ContextualSimilarityMiner
from pml_extras.regularizers import ClassInterferenceRegularizer

cosine = CosineSimilarity
Options = dict[str, Any]
# Each loss with its options. c: number of training classes, d: embedding size, m: samples per class
# in a batch.
LOSSES: dict[str, tuple[type[nn.Module], Callable[[int, int, int], Options]]] = {
    "contextual": (ContextualLoss, lambda c, d, m: {"num_neighbors": m}),
    "center_contrastive": (CenterContrastiveLoss, lambda c, d, m: centers(c, d)),
    "center_contrastive_ema": (
        CenterContrastiveLoss,
        lambda c, d, m: {**centers(c, d), "center_update": "ema"},
    ),
    "contrastive": (
        losses.ContrastiveLoss,
        lambda c, d, m: {"pos_margin": 1.0, "neg_margin": 0.5, "distance": cosine()},
    ),
    "triplet": (losses.TripletMarginLoss, lambda c, d, m: {"margin": 0.2, "distance": cosine()}),
    "multi_similarity": (losses.MultiSimilarityLoss, lambda c, d, m: {}),
    "supcon": (losses.SupConLoss, lambda c, d, m: {}),
    "ntxent": (losses.NTXentLoss, lambda c, d, m: {"temperature": 0.1}),
    "proxy_anchor": (losses.ProxyAnchorLoss, lambda c, d, m: centers(c, d)),
    "arcface": (losses.ArcFaceLoss, lambda c, d, m: {**centers(c, d), "scale": 16}),
    "cosface": (losses.CosFaceLoss, lambda c, d, m: {**centers(c, d), "scale": 16}),
    "normalized_softmax": (losses.NormalizedSoftmaxLoss, lambda c, d, m: centers(c, d)),
    "smooth_ap": (losses.SmoothAPLoss, lambda c, d, m: {}),
}
MINERS: dict[str, Callable[[int], Any]] = {
    "none": lambda m: None,
    "multi_similarity": lambda m: miners.MultiSimilarityMiner(epsilon=0.1),
    "triplet_margin": lambda m: miners.TripletMarginMiner(0.2, "semihard", distance=cosine()),
    "contextual": lambda m: ContextualSimilarityMiner(num_neighbors=m),
}
TEACHERS = {"snapshot": SnapshotTeacher, "ema": EMATeacher}
# Learning rates of a loss's own parameters. Centers need larger steps than proxies.
LOSS_LR = {"center_contrastive": 0.1}
DEFAULT_LOSS_LR = 0.01


def centers(num_classes: int, embedding_size: int) -> Options:
    return {"num_classes": num_classes, "embedding_size": embedding_size}


def build_loss(
    args: argparse.Namespace, num_classes: int, models: dict[str, nn.Module]
) -> nn.Module:
    """The loss, with class interference and self-distillation if the arguments ask for them."""
    loss_class, options = LOSSES[args.loss]
    defaults = options(num_classes, args.embedding_size, args.samples_per_class)
    if fixed := args.loss_options.keys() & centers(0, 0).keys():
        raise UserError(f"--loss-options: {min(fixed)} follows from the other arguments")
    try:
        loss = loss_class(**{**defaults, **args.loss_options})
        if args.loss_options:
            check_loss(loss, args.embedding_size)
    except Exception as error:  # of any kind, from PML's code
        raise UserError(f"--loss-options: {type(error).__name__}: {error}") from error
    if args.interfere is not None:
        regularizer = ClassInterferenceRegularizer(
            num_classes, args.embedding_size, strength=args.interfere
        )
        regularizer.attach(loss)
    if args.distill:
        teacher = TEACHERS[args.distill](models["trunk"], models["embedder"])
        loss = SelfDistillation(loss, teacher, num_epochs=args.epochs)
    return loss


@torch.no_grad()
def check_loss(loss: nn.Module, embedding_size: int) -> None:
    """Call the loss on two classes of two samples, so that wrong options fail before training."""
    embeddings = torch.randn(4, embedding_size, generator=torch.Generator().manual_seed(0))
    value = loss(embeddings, torch.tensor([0, 0, 1, 1]))
    if not value.isfinite():
        raise ValueError(f"the loss of a random batch is {value.item()}")


def build_miner(args: argparse.Namespace) -> Any:
    return MINERS[args.miner](args.samples_per_class)


def drop_label_issues(sampler: MPerClassSampler, detector: LabelNoiseDetector) -> None:
    """Stop sampling images with label issues. A class without other images keeps all of them."""
    is_clean = ~detector.is_issue.numpy()
    for label, indices in get_labels_to_indices(detector.labels).items():
        kept = indices[is_clean[indices]]
        sampler.labels_to_indices[label] = kept if len(kept) else indices
