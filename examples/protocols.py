"""The protocol of the contextual loss's authors, and the results that they and others published.

The settings are those of their code for 256 x 256 pixels (arXiv 2210.01908). Three differences:
they report the best test epoch, and this reports the last one; for SOP and In-Shop they squash the
test images to a square first; for SOP they sample batches from few categories.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from images import UserError
from torch import nn
from trunks import Trunk

LEARNING_RATES = {"cub": 8e-5, "cars196": 1.6e-4, "sop": 4e-5, "inshop": 4e-5}
RECALL_AT = {
    "cub": (1, 2, 4, 8),
    "cars196": (1, 2, 4, 8),
    "sop": (1, 10, 100, 1000),
    "inshop": (1, 10, 20, 30, 40, 50),
}
NAMES = tuple(LEARNING_RATES)

# Published recall@1 in percent, all with a ResNet-50.
CONTEXTUAL = "2210.01908, 256 pixels, 512-d, best test epoch"
CENTERS = "2308.00458"
PUBLISHED: dict[str, dict[str, tuple[float, str]]] = {
    "cub": {"contextual": (68.7, CONTEXTUAL), "center_contrastive": (73.45, CENTERS)},
    "cars196": {"contextual": (89.3, CONTEXTUAL), "center_contrastive": (91.02, CENTERS)},
    "sop": {"contextual": (83.3, CONTEXTUAL), "center_contrastive": (83.10, CENTERS)},
    "inshop": {},
}


def settings(name: str) -> dict[str, Any]:
    """The defaults of the command line."""
    lr = LEARNING_RATES[name]
    return {
        "dataset": name,
        "trunk": "torchvision:resnet50:IMAGENET1K_V1",
        "image_size": 256,
        "embedding_size": 512,
        "init": "random",
        "epochs": 80,
        "batch_size": 128,
        "samples_per_class": 4,
        "lr": lr,
        "trunk_lr": lr / 2,
        "weight_decay": 1e-4,
        "schedule": "multistep",
        "freeze_norm": True,
    }


def adapt(trunk: Trunk, name: str) -> Trunk:
    """A ResNet of torchvision with the authors' pooling and test crop; others stay as they are."""
    if not (hasattr(trunk.network, "avgpool") and hasattr(trunk.network, "fc")):
        return trunk
    if name in ("cub", "cars196"):
        trunk.network.avgpool = nn.AdaptiveMaxPool2d(1)
        trunk.network.fc = nn.LayerNorm(trunk.width, elementwise_affine=False)
    return replace(trunk, center=256 / 288)


def check(name: str, dataset: str) -> None:
    if name != dataset:
        raise UserError(f"--protocol {name} is for --dataset {name}, not {dataset}")


def row(
    name: str, loss: str, trunk: str, size: int, after: dict[str, float], epochs: int, note: str
) -> str:
    """The measured result beside the published one, as a Markdown table."""
    recalls = [f"R@{k}" for k in RECALL_AT[name]]
    values = [f"{100 * after[f'recall_at_{k}']:.1f}" for k in RECALL_AT[name]]
    published = PUBLISHED[name].get(loss)
    cell = f"{published[0]} ({published[1]})" if published else "-"
    if published and note:
        cell += f"; not comparable: {note}"
    header = ["dataset", "loss", "trunk", "pixels", "epochs", *recalls, "published R@1"]
    cells = [name, loss, trunk, str(size), str(epochs), *values, cell]
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), cells))
