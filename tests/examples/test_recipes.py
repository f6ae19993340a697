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
        assert path.stem == "digits" or f'"{path.stem}' in text


def test_plain_loop(recipe):
    assert recipe("plain_loop").main(epochs=2) > 0.75


def test_mixed_precision(recipe, capsys):
    assert recipe("mixed_precision").main(steps=40) > 0.6
    assert "torch.float32" in capsys.readouterr().out


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
