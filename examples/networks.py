"""A small convolutional trunk and a linear embedder, for images of 8 to 224 pixels a side.

They train from scratch in seconds. For photographs, use a pre-trained trunk instead: any module
that maps (N, channels, size, size) to (N, features).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def build_trunk(channels: int, size: int, width: int = 64) -> nn.Module:
    """Convolutions and pooling down to about 4 pixels, then 2 x 2 average pooling.

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
    # With global average pooling instead of 2 x 2, a 6 and a 9 would look the same.
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten())


def build_embedder(embedding_size: int, width: int = 64) -> nn.Module:
    return nn.Linear(4 * width, embedding_size)


class Bfloat16(nn.Module):
    """Runs a module under bfloat16 autocast and returns float32.

    Losses and distances need the precision of float32. bfloat16 needs no gradient scaler.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            output: Tensor = self.module(x)
        return output.float()
