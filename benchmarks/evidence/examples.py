"""What the benchmarks use of the examples, which are scripts in one folder and not a package."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import checkpoint
from datasets import ROOT_VARIABLE, Images, UserError, hold_out, load, with_label_noise
from networks import build_embedder, build_trunk

__all__ = [
    "ROOT_VARIABLE",
    "Images",
    "UserError",
    "build_embedder",
    "build_trunk",
    "checkpoint",
    "hold_out",
    "load",
    "with_label_noise",
]
