"""``python -m pml_extras`` reports versions, and importing the package loads nothing heavy."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata

import torch

import pml_extras


def run_python(*arguments: str) -> str:
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_reports_installed_versions_and_devices():
    report = dict(line.split(maxsplit=1) for line in run_python("-m", "pml_extras").splitlines())
    assert report["pml_extras"] == pml_extras.__version__
    for package in ("pytorch-metric-learning", "numpy"):
        assert report[package] == f"{metadata.version(package)} ({package})"
    assert report["torch"].split()[0] == torch.__version__
    assert f"CUDA {torch.version.cuda}" in report["torch"]
    assert report["devices"].startswith("cpu")
    assert len(report["devices"].split(", ")) == 1 + torch.cuda.device_count()


def test_reports_which_package_provides_faiss(monkeypatch):
    from pml_extras.__main__ import report

    def version(package: str) -> str:
        if package in installed:
            return installed[package]
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(metadata, "version", version)
    installed = {"faiss-gpu": "1.9"}
    assert report()["faiss"] == "1.9 (faiss-gpu)"
    installed = {}
    assert report()["faiss"] == "not installed"


def test_importing_the_package_loads_nothing_heavy():
    heavy = "{'torch', 'numpy', 'faiss', 'sklearn', 'matplotlib', 'pytorch_metric_learning'}"
    code = f"import sys, pml_extras; print({heavy} & set(sys.modules))"
    assert run_python("-c", code) == "set()\n"
