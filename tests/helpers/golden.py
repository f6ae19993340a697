"""Golden values: results of the authors' code, in tests/data/."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

DATA = Path(__file__).parents[1] / "data"


def golden_cases(name: str) -> list[dict[str, Tensor]]:
    """The cases in tests/data/NAME.npz: inputs, and the results that the authors' code gave."""
    with np.load(DATA / f"{name}.npz") as file:
        return [
            {
                key.split("_", 1)[1]: torch.as_tensor(file[key])
                for key in file.files
                if key.startswith(f"case{i}_")
            }
            for i in range(int(file["num_cases"]))
        ]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual - expected‖ / ‖expected‖, in float64."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm())
