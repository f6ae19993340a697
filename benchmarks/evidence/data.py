"""What training and selection see, and, apart from it, what only the final test sees."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import torch
from datasets import Images
from pytorch_metric_learning.samplers import MPerClassSampler
from torch import Tensor
from torch.utils.data import BatchSampler, RandomSampler

from .plan import CONDITIONS, DATASETS, Condition, Sizes

ROOT = Path(
    os.environ.get("PML_EXTRAS_DATA", Path(__file__).parents[3] / "shared" / "data")
)  # the default of --data-root
CIFAR_TEST_IMAGES = 100  # a class, and the last of the class in examples/datasets.py


class Training(NamedTuple):
    """All that selection is given. It holds no image of a test class."""

    images: Images  # with the labels that training is told
    true_labels: list[int]
    validation: Images  # of other classes than `images`; in classification other images


class Test(NamedTuple):
    images: Images
    rare: frozenset[int]  # labels of the classes that are like the rare ones in training


def load_training(dataset: str, start: str, condition: str, seed: int, root: Path) -> Training:
    """`start` may also be "pretraining": the half of the classes that is not fine-tuned on."""
    spec, how = DATASETS[dataset], CONDITIONS[condition]
    if spec.classification:
        images, validation = datasets.hold_out(_official(spec.source, start, root, test=False))
    else:
        every = _classes(spec.source, root, test=False)
        place = places(every.names)
        validation = of_classes(every, place % 5 == 4)
        # Unseen classes of the training alphabets, for the test that a long tail needs.
        kept = (place % 5 != 4) & ((place % 5 != 2) | (how.imbalance == 1))
        images = of_classes(every, half(kept, start))
    images = impoverish(images, how, seed)
    told = datasets.with_label_noise(images, how.noise, seed)
    mirrored = spec.source == "cifar100"
    return Training(replace(told, flip=mirrored), images.labels, validation)


def load_test(dataset: str, start: str, condition: str, seed: int, root: Path) -> Test:
    spec, how = DATASETS[dataset], CONDITIONS[condition]
    if spec.classification:
        return Test(_official(spec.source, start, root, test=True), frozenset())
    if how.imbalance == 1:
        return Test(_classes(spec.source, root, test=True), frozenset())
    every = _classes(spec.source, root, test=False)
    images = of_classes(every, places(every.names) % 5 == 2)
    share = shares(images.names, every.names, how.imbalance, seed)
    rare = np.flatnonzero(share <= np.quantile(share, 1 / 3))
    return Test(images, frozenset(rare.tolist()))


# One function reads either the training classes or the test classes, never both into one object.
@lru_cache(maxsize=4)
def _classes(source: str, root: Path, test: bool) -> Images:
    data = datasets.load(source, root, image_size=0)
    return data.test if test else data.train


@lru_cache(maxsize=4)
def _official(source: str, start: str, root: Path, test: bool) -> Images:
    """CIFAR-100 as the classification problem it was made for."""
    halves = [_classes.__wrapped__(source, root, test=half) for half in (False, True)]
    sources = [half.source for half in halves]
    labels = halves[0].labels + [label + len(halves[0].names) for label in halves[1].labels]
    pixels = torch.cat([s for s in sources if isinstance(s, Tensor)])
    pooled = Images(pixels, labels, halves[0].names + halves[1].names, halves[0].size)
    left = Counter(labels)
    chosen = []
    for index, label in enumerate(labels):
        if (left[label] <= CIFAR_TEST_IMAGES) == test:
            chosen.append(index)
        left[label] -= 1
    every = np.ones(len(pooled.names), dtype=bool)
    return of_classes(pooled.subset(chosen), half(every, start))


def alphabet(name: str) -> str:
    return name.rpartition("/")[0] or name  # classes without alphabets are their own


def places(names: Sequence[str]) -> np.ndarray:
    """The place of each class in its alphabet, so that any choice of places is from all alphabets;
    where there are none, its place in the list."""
    groups = [name.rpartition("/")[0] for name in names]
    seen: Counter[str] = Counter()
    result = []
    for group in groups:
        result.append(seen[group])
        seen[group] += 1
    return np.array(result)


def half(kept: np.ndarray, start: str) -> np.ndarray:
    """Of the classes that are kept (a bool a class), those that a start trains on."""
    return kept if start == "scratch" else kept & (np.cumsum(kept) % 2 == (start == "finetune"))


def of_classes(images: Images, chosen: np.ndarray) -> Images:
    """The images of the chosen classes (a bool a class), labelled from 0."""
    numbers = np.cumsum(chosen) - 1
    kept = [i for i, label in enumerate(images.labels) if chosen[label]]
    names = [name for name, is_chosen in zip(images.names, chosen, strict=True) if is_chosen]
    part = images.subset(kept)
    return replace(part, labels=[int(numbers[label]) for label in part.labels], names=names)


def shares(names: Sequence[str], every: Sequence[str], imbalance: float, seed: int) -> np.ndarray:
    """The share of each class's images that a long tail leaves: geometric over the alphabets, in
    random order, from 1 to 1 / imbalance."""
    alphabets = sorted({alphabet(name) for name in every})
    rank = np.random.default_rng(seed).permutation(len(alphabets))
    share = dict(zip(alphabets, imbalance ** (-rank / (len(alphabets) - 1)), strict=True))
    return np.array([share[alphabet(name)] for name in names])


def impoverish(images: Images, how: Condition, seed: int) -> Images:
    """Leave out, of each class, what is withheld or beyond the tail; at least one image stays."""
    share = shares(images.names, images.names, how.imbalance, seed) * (1 - how.withheld)
    labels = np.array(images.labels)
    order = np.random.default_rng(seed).permutation(len(labels))
    kept: list[int] = []
    for label in range(len(images.names)):
        members = order[labels[order] == label]
        kept += members[: max(1, math.ceil(len(members) * share[label] - 1e-9))].tolist()
    return images.subset(sorted(kept)) if len(kept) < len(images) else images


# ---- Batches of images in memory.


def normalized(pixels: Tensor) -> Tensor:
    return pixels.float().div_(127.5).sub_(1).contiguous(memory_format=torch.channels_last)


class Batches:
    """Iterating it is one epoch: batches of images and labels, on the device."""

    def __init__(
        self,
        images: Images,
        sizes: Sizes,
        by_class: bool,  # or as the images come
        steps: int,
        device: torch.device,
    ) -> None:
        assert isinstance(images.source, Tensor)
        self.pixels = images.source.to(device)
        self.labels = torch.tensor(images.labels, device=device)
        self.flip, self.sizes, self.by_class, self.steps = images.flip, sizes, by_class, steps
        self.leave_out(())

    def leave_out(self, indices: Sequence[int]) -> None:
        """From now on, draw none of these images, and all others."""
        kept = np.delete(np.arange(len(self.labels)), indices)
        count = self.steps * self.sizes.batch
        labels = self.labels[kept].cpu()
        sampler = (
            MPerClassSampler(labels, self.sizes.per_class, self.sizes.batch, count)
            if self.by_class
            else RandomSampler(range(len(kept)), num_samples=count)
        )
        self.kept = torch.from_numpy(kept).to(self.pixels.device)
        self.indices = BatchSampler(sampler, self.sizes.batch, drop_last=True)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for indices in self.indices:
            chosen = self.kept[indices]
            batch = normalized(self.pixels[chosen])
            if self.flip:
                mirrored = torch.rand(len(batch), device=batch.device) < 0.5
                batch[mirrored] = batch[mirrored].flip(-1)
            yield batch, self.labels[chosen]
