"""The benchmarks and the examples are not in the package, so their folders are put on the path."""

import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]


@pytest.fixture(scope="session")
def omniglot(tmp_path_factory):
    """A synthetic omniglot28.npz of ten classes per alphabet: six alphabets to train, two unseen.

    All pixels of an image are the number of its class: 0-59 to train, 60-79 unseen.
    """
    folder = tmp_path_factory.mktemp("omniglot")
    y = np.repeat(np.arange(80), 20)
    x = np.broadcast_to(y[:, None, None], (len(y), 28, 28)).astype(np.uint8)
    names = np.array([f"alphabet{c // 10}/character{c % 10}" for c in range(80)])
    np.savez(folder / "omniglot28.npz", x=x, y=y, is_eval=y >= 60, class_names=names)
    return folder


@pytest.fixture(scope="session")
def cifar100(tmp_path_factory):
    """A synthetic cifar100_subset.npz of eight classes with 10 training and 100 test images each.

    The test images are white.
    """
    folder = tmp_path_factory.mktemp("cifar100")
    classes = np.array([0, 1, 2, 3, 50, 51, 52, 53])
    train_y, test_y = np.repeat(classes, 10), np.repeat(classes, 100)
    shape = (32, 32, 3)
    np.savez(
        folder / "cifar100_subset.npz",
        train_x=np.broadcast_to(train_y[:, None, None, None], (80, *shape)).astype(np.uint8),
        train_y=train_y,
        test_x=np.full((800, *shape), 255, np.uint8),
        test_y=test_y,
        class_names=np.array([f"class{c}" for c in range(100)]),
    )
    return folder
