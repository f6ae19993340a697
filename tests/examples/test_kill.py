"""Runs of train.py that are killed (SIGKILL) and resumed."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time

import checkpoint
import cli
import figures
import numpy as np
import pytest
import torch
import train

ARGUMENTS = ["--loss", "center_contrastive", "--miner", "contextual", "--interfere"]


def small_omniglot(folder):
    generator = np.random.default_rng(0)
    y = np.repeat(np.arange(12), 10)
    strokes = generator.integers(0, 255, (12, 28, 28))
    x = np.clip(strokes[y] + generator.normal(0, 60, (120, 28, 28)), 0, 255).astype(np.uint8)
    names = np.array([f"class {i}" for i in range(12)])
    np.savez(folder / "omniglot28.npz", x=x, y=y, is_eval=(y >= 8), class_names=names)
    return ["--dataset", "omniglot", "--data-root", str(folder), "--batch-size", "32"]


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    for name in ("training_curves", "retrieval_board", "embedding_map", "similarity_distributions"):
        monkeypatch.setattr(figures, name, lambda path, *arguments: path.touch())


def run(out, epochs, data):
    """One attempt, in this process."""
    torch.set_num_threads(1)
    resume = ["--resume"] if (out / "checkpoint.pt").exists() else []
    # An attempt that was killed before its first checkpoint leaves a partial file.
    if not resume and out.is_dir():
        for path in out.glob("checkpoint.pt.part"):
            path.unlink()
    command = [*data, *ARGUMENTS, "--out", str(out), "--epochs", str(epochs), *resume]
    return cli.call(train.run, command)


@pytest.mark.parametrize(
    "kills", [3, pytest.param(50, marks=pytest.mark.long)], ids=["3 kills", "50 kills"]
)
def test_killed_runs_lose_only_the_unfinished_epoch(kills, tmp_path):
    data = small_omniglot(tmp_path)
    started = time.perf_counter()
    run(tmp_path / "short", 1, data)
    span = time.perf_counter() - started  # setup and one epoch
    # A fork has imported everything, so it can be killed at any moment of a run.
    fork = multiprocessing.get_context("fork")
    generator = random.Random(0)
    done = attempts = 0
    while attempts < kills or done == 0:
        attempts += 1
        assert attempts < kills + 20
        attempt = fork.Process(target=run, args=(tmp_path / "killed", 10_000, data))
        attempt.start()
        # Wait longer if the machine is so slow that no epoch is complete yet.
        time.sleep(generator.uniform(0, 2 * span * max(1, attempts - kills + 1)))
        os.kill(attempt.pid, signal.SIGKILL)
        attempt.join()
        if (tmp_path / "killed" / "checkpoint.pt").exists():
            state = checkpoint.load(tmp_path / "killed" / "checkpoint.pt")  # always readable
            assert state["epoch"] >= done
            assert [row["epoch"] for row in state["history"]] == list(range(state["epoch"] + 1))
            done = state["epoch"]
    assert run(tmp_path / "killed", done + 2, data) == 0
    assert run(tmp_path / "whole", done + 2, data) == 0
    states = [checkpoint.load(tmp_path / name / "checkpoint.pt") for name in ("killed", "whole")]
    for state in states:
        del state["seconds"], state["config"]
    assert_equal(*states)


def assert_equal(actual, expected):
    assert type(actual) is type(expected)
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for key in expected:
            assert_equal(actual[key], expected[key])
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected)
        for a, e in zip(actual, expected, strict=True):
            assert_equal(a, e)
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(actual, expected)
    else:
        assert actual == expected
