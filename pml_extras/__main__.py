"""``python -m pml_extras`` prints what a bug report needs: versions, builds and devices."""

import platform
from importlib import metadata

import torch

import pml_extras


def version(*packages: str) -> str:
    """The version of the first of these packages that is installed."""
    for package in packages:
        try:
            return f"{metadata.version(package)} ({package})"
        except metadata.PackageNotFoundError:
            continue
    return "not installed"


def report() -> dict[str, str]:
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    build = f"CUDA {torch.version.cuda}, ROCm {torch.version.hip}"
    return {
        "pml_extras": pml_extras.__version__,
        "pytorch-metric-learning": version("pytorch-metric-learning"),
        "torch": f"{torch.__version__} (built for {build})",
        "faiss": version("faiss-cpu", "faiss-gpu", "faiss-gpu-cu12", "faiss"),
        "numpy": version("numpy"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "devices": ", ".join([f"cpu ({torch.get_num_threads()} threads)", *gpus]),
    }


if __name__ == "__main__":
    for name, value in report().items():
        print(f"{name:24} {value}")
