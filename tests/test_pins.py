"""Versions that are written in several files agree."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def find(file: str, pattern: str) -> list[str]:
    return re.findall(pattern, (ROOT / file).read_text(), re.MULTILINE)


def test_pre_commit_uses_the_pinned_ruff():
    pinned = find("constraints.txt", r"^ruff==(.*)$")
    assert pinned == find(".pre-commit-config.yaml", r"ruff-pre-commit\n +rev: v(\S+)")


def test_ci_runs_on_the_pythons_that_the_package_declares():
    declared = find("pyproject.toml", r"Python :: (3\.\d+)")
    (matrix,) = find(".github/workflows/ci.yml", r"python: \[(.*)\]")
    assert declared == re.findall(r"3\.\d+", matrix)


def test_python_3_10_has_the_same_pins_as_the_other_pythons():
    pins = find("constraints.txt", r"^\w.*$")
    assert set(find("constraints-3.10.txt", r"^\w.*$")) <= set(pins)
