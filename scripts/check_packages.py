#!/usr/bin/env python3
"""Build the sdist and the wheel, check their contents, and test them in new environments.

    scripts/check_packages.py oldest      with the oldest torch that pyproject.toml allows
    scripts/check_packages.py newest      with the newest torch that pip finds
    scripts/check_packages.py             both

The environments use the Python that runs this script. The oldest torch has no builds for the newest
Python. `make test` does not run the script, because it downloads torch, which takes gigabytes.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
METADATA = [  # shown by package indices
    "Name", "Version", "Summary", "License-Expression", "License-File", "Requires-Python",
    "Keywords", "Author", "Description", "Description-Content-Type",
]  # fmt: skip
IN_SDIST = [
    "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md",
    "constraints.txt", "pml_extras/py.typed", "pyproject.toml", "tests/data/contextual.npz",
]  # fmt: skip
IMPORT_ALL = """
import importlib, pkgutil, sys, pml_extras
assert "site-packages" in pml_extras.__file__, pml_extras.__file__
assert not {"torch", "faiss", "sklearn", "matplotlib"} & set(sys.modules), "import is not light"
names = [m.name for m in pkgutil.walk_packages(pml_extras.__path__, "pml_extras.")]
for name in names:
    module = importlib.import_module(name)
    assert all(hasattr(module, public) for public in getattr(module, "__all__", [])), name
print(f"imported {len(names)} modules")
"""


def run(*command: str | Path, cwd: Path) -> None:
    # Import the installed package rather than the checkout, and ignore its constraints.
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "PIP_CONSTRAINT")
    }
    print("$", *(str(part).replace(str(cwd), ".") for part in command if "\n" not in str(part)))
    sys.stdout.flush()
    subprocess.run(command, cwd=cwd, env=environment, check=True)


def create_environment(folder: Path) -> Path:
    """Create an empty environment and return its Python."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    # Old versions of pip download whole packages to read their metadata.
    run(python, "-m", "pip", "install", "-q", "--upgrade", "pip", cwd=folder)
    return python


def build(work: Path) -> tuple[Path, Path]:
    """Build the packages and return the paths of the sdist and the wheel."""
    python = create_environment(work / "build")
    tools = "build", "twine", "readme-renderer[md]"
    run(python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", *tools, cwd=work)
    # This builds the wheel from the sdist, so it fails if the sdist is incomplete.
    run(python, "-m", "build", ROOT, "--outdir", work / "dist", cwd=work)
    (sdist,), (wheel,) = (work / "dist").glob("*.tar.gz"), (work / "dist").glob("*.whl")
    run(python, "-m", "twine", "check", "--strict", sdist, wheel, cwd=work)
    return sdist, wheel


def check_contents(sdist: Path, wheel: Path) -> Message:
    """Check which files and metadata the packages contain, and return the metadata."""
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        (info,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
        metadata = message_from_bytes(file.read(f"{info}/METADATA"))
    sources = {
        str(path.relative_to(ROOT)) for path in (ROOT / "pml_extras").rglob("*.py")
    } | {"pml_extras/py.typed"}  # fmt: skip
    packed = {name for name in names if not name.startswith(f"{info}/")}
    assert packed == sources, f"files only in the wheel or only in the sources: {packed ^ sources}"
    assert f"{info}/licenses/LICENSE" in names, "the wheel has no license"
    values = {**metadata, "Description": metadata.get_payload()}
    missing = [name for name in METADATA if not values.get(name)]
    assert not missing, f"missing in the metadata: {missing}"
    assert "Typing :: Typed" in metadata.get_all("Classifier", [])
    version = metadata["Version"]
    citation = (ROOT / "CITATION.cff").read_text()
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert f"\nversion: {version}\n" in citation, f"CITATION.cff does not have version {version}"
    has_entry = f"\n## [{version}]" in changes or "\n## [Unreleased]" in changes
    assert has_entry, f"CHANGELOG.md has no entry for {version}"
    with tarfile.open(sdist) as file:
        inside = {name.partition("/")[2] for name in file.getnames()}
    missing = sorted(set(IN_SDIST) - inside)
    assert not missing, f"missing in the sdist: {missing}"
    print(f"{wheel.name}: {len(packed)} files; {sdist.name}: {len(inside)} files")
    return metadata


def check_installed(torch: str, sdist: Path, wheel: Path, extras: list[str], work: Path) -> None:
    """Install the packages with this torch and no extras, and run their doctests and tests."""
    python = create_environment(work / "environment")
    run(python, "-m", "pip", "install", "-q", torch, wheel, cwd=work)
    check_import(python, work)
    # Replace the wheel by the sdist in the same environment, to download torch only once.
    run(python, "-m", "pip", "uninstall", "-q", "-y", "pml-extras", cwd=work)
    run(python, "-m", "pip", "install", "-q", sdist, cwd=work)
    check_import(python, work)
    for extra in extras:
        requirement = f"{wheel}[{extra}]"
        run(python, "-m", "pip", "install", "-q", "--dry-run", torch, requirement, cwd=work)
    # The doctests use every component. The tests come from the sdist.
    run(python, "-m", "pip", "install", "-q", torch, "pytest", cwd=work)
    with tarfile.open(sdist) as file:
        (top,) = {name.split("/")[0] for name in file.getnames()}
        file.extractall(work, [m for m in file.getmembers() if m.name.startswith(f"{top}/tests/")])
    pytest = [python, "-m", "pytest", "-q", "--doctest-modules", "--import-mode=importlib"]
    run(*pytest, "-o", "pythonpath=tests", "--pyargs", "pml_extras", cwd=work / top)
    # In separate processes: old versions of torch may hang in a process that forks after compiling.
    for tests in ("tests/functional", "tests/losses"):
        run(*pytest, "-o", "pythonpath=tests", tests, cwd=work / top)


def check_import(python: Path, work: Path) -> None:
    run(python, "-m", "pip", "check", cwd=work)
    run(python, "-c", IMPORT_ALL, cwd=work)


def main() -> None:
    jobs = sys.argv[1:] or ["oldest", "newest"]
    if not set(jobs) <= {"oldest", "newest"}:
        sys.exit(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        sdist, wheel = build(work)
        metadata = check_contents(sdist, wheel)
        requirements = " ".join(metadata.get_all("Requires-Dist", []))
        oldest = re.search(r"\btorch>=([\d.]+)", requirements)
        assert oldest, requirements
        for job in jobs:
            torch = f"torch=={oldest[1]}" if job == "oldest" else "torch"
            extras = metadata.get_all("Provides-Extra", [])
            if job == "oldest":
                extras.remove("gpu")  # faiss-gpu needs CUDA 12.6, the oldest torch has 12.4
            (work / job).mkdir()
            check_installed(torch, sdist, wheel, extras, work / job)
            print(f"{job}: passed")


if __name__ == "__main__":
    main()
