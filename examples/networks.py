"""A small convolutional trunk and a linear embedder, for images of 8 to 224 pixels a side.

They train from nothing in seconds. For photographs, put a pre-trained network in the trunk's place:
anything that maps (N, channels, size, size) to (N, features) will do.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def build_trunk(channels: int, size: int, width: int = 64) -> nn.Module:
    """Convolutions that halve the image until about 4 pixels are left, then a 2 x 2 average.

    (N, channels, size, size) -> (N, 4 * width).
    """
    halvings = max(1, math.ceil(math.log2(size / 7)))
    layers: list[nn.Module] = []
    for depth in range(halvings + 2):
        layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)]
        layers += [nn.ReLU(inplace=True)]
        if depth < halvings:
            layers += [nn.MaxPool2d(2)]
        channels = width
    # Keeping 2 x 2 regions apart tells a 6 from a 9; one global average could not.
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten())


def build_embedder(embedding_size: int, width: int = 64) -> nn.Module:
    return nn.Linear(4 * width, embedding_size)


class Bfloat16(nn.Module):
    """Runs a network under bfloat16 autocast and hands on float32, so that losses and distances,
    which need the precision, never see the shorter type. bfloat16 needs no gradient scaler."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            output: Tensor = self.module(x)
        return output.float()
