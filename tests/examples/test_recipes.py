"""The recipes, with fewer steps."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pml_extras.losses import CenterContrastiveLoss, ContextualLoss, ListwiseDistillationLoss

RECIPES = Path(__file__).parents[2] / "examples" / "recipes"


@pytest.fixture
def recipe(monkeypatch, tmp_path):
    """Import a recipe. It runs in a temporary directory."""
    monkeypatch.syspath_prepend(str(RECIPES))
    monkeypatch.chdir(tmp_path)

    def load(name):
        spec = importlib.util.spec_from_file_location(f"recipe_{name}", RECIPES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    yield load
    sys.modules.pop("digits", None)


def test_every_recipe_is_tested():
    text = Path(__file__).read_text()
    for path in RECIPES.glob("*.py"):
        own_tests = Path(__file__).with_name(f"test_{path.stem}_recipe.py")
        assert path.stem == "digits" or f'"{path.stem}' in text or own_tests.exists()


def test_plain_loop(recipe):
    assert recipe("plain_loop").main(epochs=2) > 0.75


def test_mixed_precision(recipe, capsys):
    assert recipe("mixed_precision").main(steps=40) > 0.6
    assert "torch.float32" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:num_neighbors")
def test_gradient_cache(recipe):
    module = recipe("gradient_cache")
    difference, _ = module.main(batch_size=320, chunk_size=64, steps=1)
    assert difference < 1e-5


def test_gradient_cache_with_dropout_and_all_losses(recipe):
    """The gradient of each loss on 4,096 images in chunks of 64 is that of the whole batch."""
    module = recipe("gradient_cache")
    images, labels = torch.randn(4096, 6), torch.arange(4096) % 512
    model = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 8))
    centers = CenterContrastiveLoss(512, 8)
    teacher = torch.randn(4096, 8)
    distillation = ListwiseDistillationLoss()
    losses = {
        "contextual": ContextualLoss(num_neighbors=8),
        "center contrastive": centers,
        "ema centers": CenterContrastiveLoss(512, 8, center_update="ema", momentum=0.0),
        "listwise": lambda x, y: distillation(x, ref_emb=teacher),
    }
    for name, loss_func in losses.items():
        difference = module.largest_difference(
            model.double(), loss_func, images.double(), labels, 64
        )
        assert difference < 1e-5, name
    # Dropout draws the same numbers in both passes.
    dropout = torch.nn.Sequential(model.float(), torch.nn.Dropout(0.5))
    torch.manual_seed(0)
    expected = [p.grad.clone() for p in run_backward(dropout, centers, images, labels)]
    torch.manual_seed(0)
    dropout.zero_grad()
    module.cached_backward(dropout, centers, images, labels, 4096)
    for actual, e in zip(dropout.parameters(), expected, strict=True):
        assert torch.allclose(actual.grad, e, atol=1e-5 * float(e.abs().max()))


def run_backward(model, loss_func, images, labels):
    loss_func(model(images), labels).backward()
    return list(model.parameters())


def test_rerank_files(recipe, tmp_path):
    labels = torch.arange(60) % 6
    np.save(tmp_path / "x.npy", torch.nn.functional.one_hot(labels).float().numpy())
    np.save(tmp_path / "y.npy", labels.numpy())
    scores = recipe("rerank").main(tmp_path / "x.npy", tmp_path / "y.npy")
    assert set(scores.values()) == {1.0}


def test_rerank_digits(recipe):
    scores = recipe("rerank").main()
    assert scores[40] > scores[0]


def test_many_classes(recipe):
    losses = recipe("many_classes").main(classes=2000, steps=3)
    assert np.isfinite(losses).all()


def test_resume(recipe, tmp_path):
    uninterrupted, resumed = recipe("resume").main(epochs=2, path=tmp_path / "resume.pt")
    assert torch.equal(uninterrupted, resumed)


def run(*command):
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return float(done.stdout.rsplit("held-out images ", 1)[1])


def test_distributed():
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", 2, "--standalone")
    assert run(*torchrun, RECIPES / "distributed.py", "--steps", 10) > 0.5


@pytest.mark.parametrize("devices", [1, 2])
def test_fabric(devices, tmp_path):
    options = ("--epochs", 1, "--accelerator", "cpu", "--devices", devices)
    path = tmp_path / "fabric.ckpt"
    assert run(RECIPES / "fabric.py", *options, "--path", path) > 0.5
    saved = torch.load(path, weights_only=True)
    assert list(saved["loss"]) == ["centers"]
    assert set(saved["optimizer"]["state"]) == {*range(len(saved["model"])), len(saved["model"])}
