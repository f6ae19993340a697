"""The data of an experiment. Training and selection get one object, the final test another."""

from __future__ import annotations

import argparse
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from pytorch_metric_learning.samplers import MPerClassSampler
from torch import Tensor
from torch.utils.data import BatchSampler, RandomSampler

from . import examples
from .components import Sizes
from .conditions import CONDITIONS, DATASETS, Condition, Scenario
from .examples import ROOT_VARIABLE, Samples, Transform, UserError

CIFAR_TEST_IMAGES = 100  # per class; examples/loaders.py puts them last


class TrainData(NamedTuple):
    """All data that training and selection see. No image is of a test class."""

    images: Samples  # with the labels to train on, which may be wrong
    true_labels: list[int]
    validation: Samples  # of other classes than `images`; in classification, other images


class TestData(NamedTuple):
    images: Samples
    rare: frozenset[int]  # labels of the classes whose alphabets are rare in training


# ---- Where the files are.


def add_data_root(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data-root",
        type=Path,
        default=os.environ.get(ROOT_VARIABLE),
        help=f"directory of the datasets' files; default: the environment variable {ROOT_VARIABLE}",
    )


def check_data_root(root: Path | None, sources: Iterable[str]) -> None:
    """Raise UserError if one of the sources needs files and the directory is missing."""
    name = next((name for name in sources if name != "digits"), None)
    if name is None or (root and root.is_dir()):
        return
    problem = f"there is no directory {root}" if root else f"{name} needs a directory of files"
    raise UserError(f"{problem}; pass --data-root DIR or set {ROOT_VARIABLE}")


# ---- Splits.


def load_train(scenario: Scenario, seed: int, root: Path | None) -> TrainData:
    """`scenario.init` may also be "pretraining": the classes that fine-tuning does not use."""
    dataset, condition = DATASETS[scenario.dataset], CONDITIONS[scenario.condition]
    if dataset.classification:
        official = _official_split(dataset.source, scenario.init, root, test=False)
        images, validation = examples.hold_out(official)
    else:
        pool = _load_classes(dataset.source, root, test=False)
        index = index_in_alphabet(pool.names)
        validation = select_classes(pool, index % 5 == 4)
        # With a long tail, one class in five is for the test: unseen, of the same alphabets.
        mask = (index % 5 != 4) & ((index % 5 != 2) | (condition.imbalance == 1))
        images = select_classes(pool, half_for(scenario.init, mask))
    images = subsample(images, condition, seed)
    noisy = examples.with_label_noise(images, condition.noise, seed)
    noisy = replace(noisy, transform=Transform(mirror=dataset.source == "cifar100"))
    return TrainData(noisy, images.labels, validation)


def load_test(scenario: Scenario, seed: int, root: Path | None) -> TestData:
    dataset, condition = DATASETS[scenario.dataset], CONDITIONS[scenario.condition]
    if dataset.classification:
        images = _official_split(dataset.source, scenario.init, root, test=True)
        return TestData(images, frozenset())
    if condition.imbalance == 1:
        return TestData(_load_classes(dataset.source, root, test=True), frozenset())
    pool = _load_classes(dataset.source, root, test=False)
    images = select_classes(pool, index_in_alphabet(pool.names) % 5 == 2)
    fraction = long_tail(images.names, pool.names, condition.imbalance, seed)
    rare = np.flatnonzero(fraction <= np.quantile(fraction, 1 / 3))
    return TestData(images, frozenset(rare.tolist()))


# Reads either the training classes or the test classes, so that no object holds both.
@lru_cache(maxsize=4)
def _load_classes(source: str, root: Path | None, test: bool) -> Samples:
    data = examples.load(source, root)
    return data.test if test else data.train


@lru_cache(maxsize=4)
def _official_split(source: str, init: str, root: Path | None, test: bool) -> Samples:
    """CIFAR-100's own training or test images, of all its classes or of half of them."""
    halves = [_load_classes.__wrapped__(source, root, test=half) for half in (False, True)]
    sources = [half.source for half in halves]
    labels = halves[0].labels + [label + len(halves[0].names) for label in halves[1].labels]
    pixels = torch.cat([s for s in sources if isinstance(s, Tensor)])
    pooled = Samples(pixels, labels, halves[0].names + halves[1].names)
    remaining = Counter(labels)
    chosen = []
    for index, label in enumerate(labels):
        if (remaining[label] <= CIFAR_TEST_IMAGES) == test:
            chosen.append(index)
        remaining[label] -= 1
    all_classes = np.ones(len(pooled.names), dtype=bool)
    return select_classes(pooled.subset(chosen), half_for(init, all_classes))


def alphabet(name: str) -> str:
    return name.rpartition("/")[0] or name  # a class without an alphabet is its own


def index_in_alphabet(names: Sequence[str]) -> np.ndarray:
    """(classes,) the index of each class in its alphabet, or in the list if there are none.

    A choice of classes by this index takes some of every alphabet.
    """
    seen: Counter[str] = Counter()
    indices = []
    for name in names:
        group = name.rpartition("/")[0]
        indices.append(seen[group])
        seen[group] += 1
    return np.array(indices)


def half_for(init: str, mask: np.ndarray) -> np.ndarray:
    """(classes,) bool: the classes of the mask that an initialization trains on.

    From scratch all; otherwise every second one, alternately for pretraining and fine-tuning.
    """
    return mask if init == "scratch" else mask & (np.cumsum(mask) % 2 == (init == "finetune"))


def select_classes(images: Samples, mask: np.ndarray) -> Samples:
    """The images of the classes in the mask, (classes,) bool, relabeled from 0."""
    new_label = np.cumsum(mask) - 1
    subset = images.subset([i for i, label in enumerate(images.labels) if mask[label]])
    names = [name for name, selected in zip(images.names, mask, strict=True) if selected]
    return replace(subset, labels=[int(new_label[label]) for label in subset.labels], names=names)


def long_tail(
    names: Sequence[str], all_names: Sequence[str], imbalance: float, seed: int
) -> np.ndarray:
    """(classes,) the fraction of the images that each class keeps.

    It falls geometrically over the alphabets, in random order, from 1 to 1 / imbalance.
    """
    alphabets = sorted({alphabet(name) for name in all_names})
    rank = np.random.default_rng(seed).permutation(len(alphabets))
    fraction = dict(zip(alphabets, imbalance ** (-rank / (len(alphabets) - 1)), strict=True))
    return np.array([fraction[alphabet(name)] for name in names])


def subsample(images: Samples, condition: Condition, seed: int) -> Samples:
    """Keep the fraction of each class that the condition leaves, at least one image."""
    fraction = long_tail(images.names, images.names, condition.imbalance, seed)
    fraction = fraction * (1 - condition.withheld)
    labels = np.array(images.labels)
    order = np.random.default_rng(seed).permutation(len(labels))
    kept: list[int] = []
    for label in range(len(images.names)):
        members = order[labels[order] == label]
        kept += members[: max(1, math.ceil(len(members) * fraction[label] - 1e-9))].tolist()
    return images.subset(sorted(kept)) if len(kept) < len(images) else images


# ---- Batches of images in memory.


def normalize_pixels(pixels: Tensor) -> Tensor:
    """uint8 to float in [-1, 1]."""
    return pixels.float().div_(127.5).sub_(1).contiguous(memory_format=torch.channels_last)


class Batches:
    """An epoch of batches of images and labels, on the device."""

    def __init__(
        self, images: Samples, sizes: Sizes, balanced: bool, steps: int, device: torch.device
    ) -> None:
        assert isinstance(images.source, Tensor)
        self.pixels = images.source.to(device)
        self.labels = torch.tensor(images.labels, device=device)
        self.flip = images.transform.mirror
        self.sizes, self.balanced, self.steps = sizes, balanced, steps
        self.exclude(())

    def exclude(self, indices: Sequence[int]) -> None:
        """From now on, draw from all images but these."""
        kept = np.delete(np.arange(len(self.labels)), indices)
        count = self.steps * self.sizes.batch_size
        labels = self.labels[kept].cpu()
        sampler = (
            MPerClassSampler(labels, self.sizes.samples_per_class, self.sizes.batch_size, count)
            if self.balanced
            else RandomSampler(range(len(kept)), num_samples=count)
        )
        self.kept = torch.from_numpy(kept).to(self.pixels.device)
        self.indices = BatchSampler(sampler, self.sizes.batch_size, drop_last=True)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for indices in self.indices:
            chosen = self.kept[indices]
            batch = normalize_pixels(self.pixels[chosen])
            if self.flip:
                mirrored = torch.rand(len(batch), device=batch.device) < 0.5
                batch[mirrored] = batch[mirrored].flip(-1)
            yield batch, self.labels[chosen]
