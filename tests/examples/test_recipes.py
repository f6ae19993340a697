"""The recipes run, at a shrunken size, and do what they say."""

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
    """Load a recipe, as running it would; what it writes goes elsewhere."""
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


def test_noisy_labels(recipe, tmp_path, capsys):
    scores = recipe("noisy_labels").main(epochs=2)
    assert (tmp_path / "labels.csv").exists()
    assert scores["with what the neighbours say"] > scores["with wrong labels"]
    precision = capsys.readouterr().out.split("precision ")[1].split(",")[0]
    assert float(precision) > 0.95


def test_resume(recipe, tmp_path):
    whole, parts = recipe("resume").main(epochs=2, path=tmp_path / "resume.pt")
    assert torch.equal(whole, parts)


def test_distributed():
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
               "--standalone", str(RECIPES / "distributed.py"), "--steps",
               "10"]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.rsplit("held-out images ", 1)[1]) > 0.5
