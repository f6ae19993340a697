"""The reproductions in docs/upstream.md assert bugs of PML. They fail once PML fixes the bugs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "upstream.md").read_text()
REPRODUCTIONS = re.findall(r"(?ms)^### ([^\n]+)\n.*?^```python\n(.*?)^```\n", PAGE)


def test_each_bug_has_a_reproduction():
    assert len(REPRODUCTIONS) == PAGE.count("\n### ") == PAGE.count("```python\n") >= 8


@pytest.mark.parametrize(
    ("title", "code"), REPRODUCTIONS, ids=[title for title, _ in REPRODUCTIONS]
)
def test_the_installed_pml_has_the_bug(title, code):
    lines = [line for line in code.splitlines() if line.strip() and "import " not in line]
    assert len(lines) <= 10, "a reproduction has at most ten lines"
    exec(compile(code, title, "exec"), {"__name__": "__main__"})
