"""Gives all tests one thread and a fixed seed, and some of them the golden cases."""

from __future__ import annotations

import pytest
import torch

from helpers.golden import golden_cases


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.set_num_threads(1)  # tests run in parallel processes
    torch.manual_seed(0)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test with an argument ``contextual_case`` or ``listwise_case`` on each such case."""
    for name in ("contextual", "listwise"):
        if f"{name}_case" in metafunc.fixturenames:
            metafunc.parametrize(f"{name}_case", golden_cases(name))
