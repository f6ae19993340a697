"""``python -m pml_extras`` prints what a bug report needs: versions, builds and devices."""

from __future__ import annotations

import platform
from importlib import metadata

import torch

import pml_extras


def installed(*packages: str) -> str:
    """The version of the first of these packages that is installed, named where others would do."""
    for package in packages:
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
        return version if len(packages) == 1 else f"{version} ({package})"
    return "not installed"


def torch_build() -> str:
    """What torch was built for, which its version does not always say."""
    if torch.version.cuda:
        return f"CUDA {torch.version.cuda}"
    return f"ROCm {torch.version.hip}" if torch.version.hip else "CPU"


def devices() -> str:
    """The devices that torch can use here."""
    names = [f"cpu ({torch.get_num_threads()} threads)"]
    names += [
        f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())
    ]
    if torch.backends.mps.is_available():
        names.append("mps")
    return ", ".join(names)


def report() -> dict[str, str]:
    return {
        "pml_extras": pml_extras.__version__,
        "pytorch-metric-learning": installed("pytorch-metric-learning"),
        "torch": f"{torch.__version__} (built for {torch_build()})",
        "faiss": installed("faiss-cpu", "faiss-gpu", "faiss-gpu-cu12", "faiss"),
        "numpy": installed("numpy"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "devices": devices(),
    }


if __name__ == "__main__":
    for name, value in report().items():
        print(f"{name:24} {value}")
