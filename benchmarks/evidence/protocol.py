"""The papers' own protocol: train on half of the classes of CUB, Cars196 or SOP, test on the rest.

The user provides the images and the backbone. Split and metrics are those of the papers. Their
optimizers and crops are not fully known, so those here are ours.
"""

from __future__ import annotations

import argparse
import importlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pytorch_metric_learning.samplers import MPerClassSampler
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from . import examples, metrics, training
from .components import Hparams, Sizes
from .data import check_data_root
from .examples import Images, UserError
from .methods import METHODS
from .metrics import MAP, P1
from .records import Record, appending, read

NAMES = ("cub", "cars196", "sop")
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])  # of ImageNet

# For the contextual loss those of its authors, for CCL those of re-implementations. The learning
# rates are ours.
HPARAMS: dict[str, Hparams] = {
    "contextual": {"contextual_weight": 0.4, "neg_margin": 0.6, "slack": 0.05},
    "center_contrastive": {"scale": 16.0, "margin": 0.2, "center_weight": 1.5, "proxy_lr": 0.1},
}

# Published R@1 in percent: image size, value, source.
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


def add_arguments(add: Callable[..., Any]) -> None:
    add("--backbone", metavar="MODULE:FUNCTION",
        help="called without arguments, returns a network from (N, 3, size, size) to "
             "(N, features); default: a small one")  # fmt: skip
    add("--method", choices=METHODS, default="contextual", metavar="NAME",
        help="a method of methods.py; default: %(default)s")  # fmt: skip
    add("--hparams", type=json.loads, default={}, metavar="JSON",
        help='hyperparameters of the method and "lr"; default: the published ones')  # fmt: skip
    add("--image-size", type=int, default=256, help="default: %(default)s")
    add("--embedding-size", type=int, default=512, help="default: %(default)s")
    add("--batch-size", type=int, default=128, help="default: %(default)s")
    add("--epochs", type=int, default=60, help="default: %(default)s")
    add("--seeds", type=int, default=1, help="default: %(default)s")
    add("--workers", type=int, default=4, help="number of processes that read images")


def run(args: argparse.Namespace, results: Path) -> None:
    check_data_root(args.data_root, [args.protocol])
    data = examples.load(args.protocol, args.data_root, args.image_size)
    if args.batch_size > len(data.train):
        raise UserError(f"--batch-size: there are {len(data.train)} images to train on")
    hparams = {"lr": 1e-4, **HPARAMS.get(args.method, {}), **args.hparams}
    missing = METHODS[args.method].space.keys() - hparams.keys()
    if missing:
        raise UserError(f"--hparams: {args.method} needs {', '.join(sorted(missing))} too")
    options: Record = {
        "protocol": args.protocol,
        "method": args.method,
        "hparams": hparams,
        "backbone": args.backbone or "small",
        **{name: getattr(args, name) for name in
           ("image_size", "embedding_size", "batch_size", "epochs")},
    }  # fmt: skip
    with appending(results) as append:
        for seed in range(args.seeds):
            if any(r | options | {"seed": seed} == r for r in read(results)):
                continue
            started = time.perf_counter()
            measured = train_and_test(args, hparams, data.train, data.test, seed)
            seconds = time.perf_counter() - started
            append({**options, "seed": seed, **measured, "seconds": seconds})
    print("\n".join(rows([r for r in read(results) if r | options == r])))


def train_and_test(
    args: argparse.Namespace, hparams: Hparams, train: Images, test: Images, seed: int
) -> Record:
    device, method = torch.device(args.device), METHODS[args.method]
    training.seed_everything(seed)
    network = build(args.backbone, args.image_size, args.embedding_size).to(device)
    sizes = method.sizes(len(train.names), args.embedding_size, args.batch_size)
    components = method.build(hparams, sizes, network, args.epochs)
    components.loss.to(device)
    batches = Loader(Crops(train, random=True), sizes, args.workers, device)
    cost = training.fit(network, components, hparams, batches, args.epochs)
    crops = DataLoader(Crops(test, random=False), 256, num_workers=args.workers)
    network.eval()
    with torch.no_grad():
        outputs = [network(images.to(device)) for images, _ in tqdm(crops, desc="testing")]
    embeddings = nn.functional.normalize(torch.cat(outputs))
    return {**cost, "test": metrics.retrieval(embeddings, test.labels)}


def build(backbone: str | None, image_size: int, embedding_size: int) -> nn.Module:
    if backbone:
        module, _, function = backbone.partition(":")
        try:
            trunk: nn.Module = getattr(importlib.import_module(module), function)()
        except (ImportError, AttributeError, ValueError) as error:
            raise UserError(f"--backbone {backbone}: {error}") from error
    else:
        trunk = examples.build_trunk(3, image_size)
    with torch.no_grad():
        shape = trunk.eval()(torch.zeros(1, 3, image_size, image_size)).shape
    if len(shape) != 2:
        raise UserError(
            f"--backbone {backbone}: the output must be (N, features), got {tuple(shape)}"
        )
    return nn.Sequential(trunk, nn.Linear(shape[1], embedding_size))


class Crops(Dataset[tuple[Tensor, int]]):
    """Square crops of image files, random and half of them mirrored, or the center.

    The shorter side of an image is first scaled to 8/7 of the crop.
    """

    def __init__(self, images: Images, random: bool) -> None:
        self.images, self.random = images, random

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        size, path = self.images.size, self.images.source[index]
        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
        except OSError as error:
            raise UserError(f"cannot read the image {path}: {error}") from error
        scale = size * 8 / 7 / min(image.size)
        width, height = (max(size, round(side * scale)) for side in image.size)
        x, y, mirror = torch.rand(3).tolist() if self.random else (0.5, 0.5, 1.0)
        left, top = round(x * (width - size)), round(y * (height - size))
        box = [edge / scale for edge in (left, top, left + size, top + size)]
        box = [*box[:2], min(box[2], image.width), min(box[3], image.height)]
        crop = image.resize((size, size), Image.Resampling.BILINEAR, box=tuple(box))
        pixels = (np.asarray(crop) / 255 - MEAN) / STD
        if mirror < 0.5:
            pixels = pixels[:, ::-1]
        tensor = torch.from_numpy(pixels.astype(np.float32, order="C"))
        return tensor.permute(2, 0, 1), self.images.labels[index]


class Loader:
    """An epoch of balanced batches, with a progress bar."""

    def __init__(self, crops: Crops, sizes: Sizes, workers: int, device: torch.device) -> None:
        batch_size = sizes.batch_size
        per_epoch = len(crops) // batch_size * batch_size
        sampler = MPerClassSampler(
            crops.images.labels, sizes.samples_per_class, batch_size, per_epoch
        )
        self.loader = DataLoader(
            crops, batch_size, sampler=sampler, num_workers=workers, drop_last=True
        )
        self.device = device

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in tqdm(self.loader, leave=False):
            yield images.to(self.device), labels.to(self.device)


def rows(records: list[Record]) -> list[str]:
    """The lines of a table of the measured and the published results."""
    lines = [
        "| dataset | method | backbone | pixels | R@1 | MAP@R | R@1 published |",
        "| --- | --- | --- | --: | --: | --: | --- |",
    ]
    for r in records:
        published = PUBLISHED.get(r["method"], {}).get(r["protocol"], [])
        others = "; ".join(
            f"{value} ({f'{size} pixels, ' if size else ''}{source})"
            for size, value, source in published
        )
        lines.append(
            f"| {r['protocol']} | {METHODS[r['method']].label} | {r['backbone']} |"
            f" {r['image_size']} | {100 * r['test'][P1]:.1f} |"
            f" {100 * r['test'][MAP]:.1f} | {others or '—'} |"
        )
    return lines
