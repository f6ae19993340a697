"""Large results, a part at a time."""

from __future__ import annotations


def parts(length: int, width: int, budget: int) -> list[slice]:
    """All of ``length`` rows of ``width`` numbers each, as many at a time as fit into ``budget``
    numbers, and at least one."""
    size = max(1, budget // max(1, width))
    return [slice(start, min(length, start + size)) for start in range(0, length, size)]
