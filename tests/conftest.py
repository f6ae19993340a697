"""Applies to all tests: one thread, a fixed seed, and the golden cases as parameters."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from helpers import golden


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.set_num_threads(1)  # tests run in parallel processes
    torch.manual_seed(0)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for name in ("contextual", "listwise"):
        if f"{name}_case" in metafunc.fixturenames:
            metafunc.parametrize(f"{name}_case", golden.golden_cases(name))


@pytest.fixture
def relative_error() -> Callable[[torch.Tensor, torch.Tensor], float]:
    return golden.relative_error
