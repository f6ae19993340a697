"""``python -m pml_extras``, and that importing the package loads nothing heavy."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata

import torch

import pml_extras


def python(*arguments: str) -> str:
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_reports_what_is_installed():
    report = dict(line.split(maxsplit=1) for line in python("-m", "pml_extras").splitlines())
    assert report["pml_extras"] == pml_extras.__version__
    for package in ("pytorch-metric-learning", "numpy"):
        assert report[package] == f"{metadata.version(package)} ({package})"
    assert report["torch"].split()[0] == torch.__version__
    assert f"CUDA {torch.version.cuda}" in report["torch"]
    assert report["devices"].startswith("cpu")
    assert len(report["devices"].split(", ")) == 1 + torch.cuda.device_count()


def test_says_where_faiss_comes_from_or_that_there_is_none(monkeypatch):
    from pml_extras.__main__ import report

    def version(package: str) -> str:
        if package in there:
            return there[package]
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(metadata, "version", version)
    there = {"faiss-gpu": "1.9"}
    assert report()["faiss"] == "1.9 (faiss-gpu)"
    there = {}
    assert report()["faiss"] == "not installed"


def test_import_is_light():
    heavy = "{'torch', 'numpy', 'faiss', 'sklearn', 'matplotlib', 'pytorch_metric_learning'}"
    assert python("-c", f"import sys, pml_extras; print({heavy} & set(sys.modules))") == "set()\n"
