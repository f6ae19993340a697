"""From a picture to the input of a network."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels


@dataclass(frozen=True)
class Transform:
    """Crop, resize and normalize a picture. It becomes float32 (channels, size, size).

    For training (`random`), the crop is the random resized crop of Inception, and half of the
    pictures are mirrored. For testing, the crop is the center. `size` None keeps the picture's own.
    """

    size: int | None = None
    mean: tuple[float, ...] = (0.5,)  # per channel, of pixels from 0 to 1
    std: tuple[float, ...] = (0.5,)
    center: float | None = (
        None  # side of the center crop, divided by the shorter side of the picture
    )
    min_area: float | None = None  # of random crops, as a fraction of the picture; None: no crops
    mirror: bool = False
    random: bool = False

    def __call__(self, picture: Image.Image) -> Tensor:
        size = (self.size, self.size) if self.size else picture.size
        picture = picture.convert("L" if len(self.mean) == 1 else "RGB")
        picture = picture.resize(size, Image.Resampling.BILINEAR, box=self.box(*picture.size))
        mirror = self.random and self.mirror and float(torch.rand(())) < 0.5
        return self.normalize(picture, mirror)

    def views(self, picture: Image.Image) -> Tensor:
        """The center crop and, for training, its mirror image: (views, channels, size, size)."""
        image = replace(self, random=False)(picture)
        return torch.stack([image, image.flip(-1)] if self.random and self.mirror else [image])

    def box(self, width: int, height: int) -> Box | None:
        if self.random and self.min_area:
            return random_box(width, height, self.min_area)
        return center_box(width, height, self.center) if self.center else None

    def normalize(self, picture: Image.Image, mirror: bool) -> Tensor:
        pixels = torch.from_numpy(np.array(picture)).float()
        pixels = pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        pixels = pixels / (255 * std) - mean / std
        return (pixels.flip(-1) if mirror else pixels).contiguous()


def center_box(width: int, height: int, fraction: float) -> Box:
    side = fraction * min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def random_box(width: int, height: int, min_area: float) -> Box:
    """Area uniform from `min_area` to 1, log of the aspect ratio uniform from 3/4 to 4/3."""
    for _ in range(10):
        u = torch.rand(4).tolist()
        area = width * height * (min_area + u[0] * (1 - min_area))
        ratio = math.exp((2 * u[1] - 1) * math.log(4 / 3))
        w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if w <= width and h <= height:
            left, top = u[2] * (width - w), u[3] * (height - h)
            return left, top, left + w, top + h
    return center_box(width, height, 1.0)
