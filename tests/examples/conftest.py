"""The examples are scripts that import each other from sys.path, not a package."""

import functools
import sys
from pathlib import Path

import pytest
import torch
import tqdm

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def no_progress_bars(monkeypatch):
    """TQDM_DISABLE, which train.py sets, has no effect if another test has imported tqdm before."""
    disabled = functools.partialmethod(tqdm.tqdm.__init__, disable=True)
    monkeypatch.setattr(tqdm.tqdm, "__init__", disabled)


@pytest.fixture(autouse=True)
def no_data_root(monkeypatch):
    monkeypatch.delenv("PML_EXTRAS_DATA", raising=False)
