"""Labeled samples, and what is done to them before training."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from images import UserError, open_picture, printable
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from transforms import Transform


@dataclass(frozen=True)
class Samples(Dataset[tuple[Tensor, int]]):
    """Labeled images or features. `labels` are indices into `names`."""

    # uint8 images (N, channels, height, width), image files, their contents, or features (N, width)
    source: Tensor | Sequence[Path] | Sequence[bytes]
    labels: list[int]
    names: list[str]
    transform: Callable[[Any], Tensor] = field(default_factory=Transform)  # not used for features
    is_query: Sequence[bool] | None = None  # the others are the gallery; None: each is both
    rows: Sequence[int] | None = None  # where the samples are in the user's file

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if not self.has_pictures:
            return self.source[index], self.labels[index]
        return self.transform(self.picture(index)), self.labels[index]

    @property
    def has_pictures(self) -> bool:
        return not (isinstance(self.source, Tensor) and self.source.ndim == 2)

    @property
    def channels(self) -> int:
        return self.source.shape[1] if isinstance(self.source, Tensor) else 3

    @property
    def size(self) -> int | None:
        """Height and width in pixels, if all images have the same."""
        return self.source.shape[-1] if isinstance(self.source, Tensor) else None

    def name(self, index: int) -> str:
        """The file of a sample, or its row in the user's file."""
        if not isinstance(self.source, Tensor) and isinstance(self.source[index], Path):
            return printable(self.source[index])
        return str(self.rows[index] if self.rows else index)

    def picture(self, index: int) -> Image.Image:
        if isinstance(self.source, Tensor):
            pixels = self.source[index].permute(1, 2, 0).squeeze(2)
            return Image.fromarray(pixels.numpy())
        return open_picture(self.source[index])

    def subset(self, indices: Sequence[int]) -> Samples:
        source: Any = self.source
        if isinstance(source, Tensor):
            source = source[torch.as_tensor(indices, dtype=torch.long)]
        else:
            source = [source[i] for i in indices]
        labels, is_query, rows = (
            values and [values[i] for i in indices]
            for values in (self.labels, self.is_query, self.rows)
        )
        return replace(self, source=source, labels=labels, is_query=is_query, rows=rows)


def digest(samples: Samples) -> str:
    """A text that changes with the labels and the images or features, but not with their place."""
    content = hashlib.blake2b(repr((samples.labels, samples.names)).encode(), digest_size=8)
    if isinstance(samples.source, Tensor):
        content.update(samples.source.contiguous().numpy().tobytes())
    else:
        for file in samples.source:
            is_file = isinstance(file, Path)
            content.update(f"{file.name} {file.stat().st_size}".encode() if is_file else file)
    return content.hexdigest()


@dataclass(frozen=True)
class Data:
    train: Samples
    test: Samples
    mirrored: bool = False  # whether mirroring an image keeps its class
    cropped: bool = False  # whether the images show the object and little else
    note: str = ""  # how the data differ from those of the papers


def hold_out(samples: Samples) -> tuple[Samples, Samples]:
    """Split into training and validation samples: every fifth sample of each class is held out.

    At least two samples per class are held out, because one sample has nothing to retrieve. A class
    of two or three samples has none held out, because training needs pairs too.
    """
    indices_by_class: dict[int, list[int]] = {}
    for index, label in enumerate(samples.labels):
        indices_by_class.setdefault(label, []).append(index)
    held_out: set[int] = set()
    for indices in indices_by_class.values():
        if len(indices) >= 10:
            held_out.update(indices[4::5])
        elif len(indices) >= 4:
            held_out.update(indices[-2:])
    if len({samples.labels[i] for i in held_out}) < 2:
        raise UserError(
            "fewer than two training classes have four samples: nothing to hold out for validation"
        )
    kept = [i for i in range(len(samples)) if i not in held_out]
    return samples.subset(kept), samples.subset(sorted(held_out))


def with_label_noise(samples: Samples, fraction: float, seed: int) -> Samples:
    """Replace this fraction of the labels by another class, drawn uniformly."""
    generator = np.random.default_rng(seed)
    labels, num_classes = np.array(samples.labels), len(samples.names)
    wrong = generator.permutation(len(labels))[: round(fraction * len(labels))]
    labels[wrong] = (labels[wrong] + generator.integers(1, num_classes, len(wrong))) % num_classes
    return replace(samples, labels=labels.tolist())


def split_classes(
    source: Tensor | Sequence[Any],
    labels: Sequence[Any] | np.ndarray,
    is_test: Sequence[bool] | np.ndarray | None,
    names: Sequence[str] | None = None,
    **options: Any,
) -> Data:
    """Training and test samples, each with labels from 0.

    Without `is_test`, the first half of the classes in sorted order (rounded up) is to train.
    """
    classes, indices = np.unique(np.asarray(labels), return_inverse=True)
    names = [str(c) for c in classes] if names is None else [str(names[c]) for c in classes]
    if is_test is None:
        is_test = indices >= (len(classes) + 1) // 2
    test_mask = np.asarray(is_test, dtype=bool)

    def part(mask: np.ndarray) -> Samples:
        present, relabeled = np.unique(indices[mask], return_inverse=True)
        everything = Samples(source, indices.tolist(), names, rows=range(len(indices)))
        chosen = everything.subset(np.flatnonzero(mask).tolist())
        return replace(chosen, labels=relabeled.tolist(), names=[names[c] for c in present])

    return Data(part(~test_mask), part(test_mask), **options)
