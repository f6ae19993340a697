"""The example in CONTRIBUTING.md: a loss that is added as described passes the tests."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "CONTRIBUTING.md").read_text()
FILES = re.findall(r"`([\w.-]+/[\w./-]+)`:\n\n(```|~~~)\w+\n(.*?)^\2$", GUIDE, re.M | re.S)
SELECTION = re.findall(r"pytest -k '(.*?)'", GUIDE)
ROWS = re.findall(r"add this \w+ to\s+`(\w+)`:\n\n```python\n(.*?)^```$", GUIDE, re.M | re.S)


@pytest.fixture
def checkout(tmp_path):
    """A copy of the repository with the example in it."""
    for name in ("pml_extras", "tests", "docs"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    for name, _, text in FILES:
        (tmp_path / name).write_text(text)
    for package, module, name in (
        ("functional", "_class_mean_loss", "class_mean_loss"),
        ("losses", "class_mean_loss", "ClassMeanLoss"),
    ):
        with (tmp_path / "pml_extras" / package / "__init__.py").open("a") as file:
            file.write(f"from .{module} import {name}\n__all__ += ['{name}']\n")
    rows = dict(ROWS)
    conformance = tmp_path / "tests" / "conformance"
    add(conformance / "components.py", "COMPONENTS = [\n", rows["COMPONENTS"].rstrip() + ",\n")
    add(conformance / "components.py", "from pml_extras.losses import (\n", "    ClassMeanLoss,\n")
    add(conformance / "test_precision_and_compile.py", "FUNCTIONS = {\n", rows["FUNCTIONS"])
    return tmp_path


def add(file: Path, after: str, text: str) -> None:
    content = file.read_text()
    assert content.count(after) == 1, after
    file.write_text(content.replace(after, after + text))


def run(checkout: Path, *arguments: str) -> None:
    path = os.pathsep.join([str(checkout), str(checkout / "tests")])
    subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=checkout,
        env=os.environ | {"PYTHONPATH": path},
        check=True,
    )


def test_the_example_has_all_files():
    assert len(FILES) == 6
    assert [name for name, _ in ROWS] == ["COMPONENTS", "FUNCTIONS"]
    assert len(SELECTION) == 1


def test_a_loss_added_as_described_passes_the_tests(checkout):
    run(checkout, "conformance.facts")
    run(checkout, "pytest", "-q", *(name for name, _, _ in FILES if name.endswith(".py")))
    ours = f"{SELECTION[0]} or class-mean or every_component or every_function"
    run(checkout, "pytest", "-q", "-k", ours, "tests/conformance", "tests/docs/test_pages.py")
    formatted = [name for name, _, _ in FILES if name.endswith(".py")]
    run(checkout, "ruff", "check", *formatted)
    run(checkout, "ruff", "format", "--check", *formatted)
