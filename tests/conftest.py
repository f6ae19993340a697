"""What all tests share: one thread, a fresh seed, and the golden values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

GOLDEN = Path(__file__).parent / "data"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.set_num_threads(1)  # the tests run side by side
    torch.manual_seed(0)


def golden_cases(name: str) -> list[dict[str, torch.Tensor]]:
    """The cases of tests/data/NAME.npz: values computed with the authors' code."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        return [
            {
                key.split("_", 1)[1]: torch.as_tensor(file[key])
                for key in file.files
                if key.startswith(f"case{i}_")
            }
            for i in range(int(file["num_cases"]))
        ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for name in ("contextual", "listwise"):
        if f"{name}_case" in metafunc.fixturenames:
            metafunc.parametrize(f"{name}_case", golden_cases(name))


@pytest.fixture
def relative_error():
    def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
        """‖actual - expected‖ / ‖expected‖, in float64."""
        actual, expected = actual.detach().double(), expected.detach().double()
        return float((actual - expected).norm() / expected.norm())

    return error
