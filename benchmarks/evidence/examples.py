"""What the benchmarks use of the examples, which are scripts in one folder and not a package."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import checkpoint
from images import UserError
from loaders import ROOT_VARIABLE, load
from samples import Samples, hold_out, with_label_noise
from transforms import Transform
from trunks import build as build_trunk
from trunks import small

__all__ = [
    "ROOT_VARIABLE",
    "Samples",
    "Transform",
    "UserError",
    "build_trunk",
    "checkpoint",
    "hold_out",
    "load",
    "small",
    "with_label_noise",
]
