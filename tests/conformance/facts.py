"""The facts about each component that its page in the documentation shows.

`make facts` writes them to docs/_data/components.json, which the documentation reads.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from .capabilities import Component
from .components import COMPONENTS

FILE = Path(__file__).parents[2] / "docs" / "_data" / "components.json"
# The capabilities that matter to users. The others only tell the tests what to expect.
SHOWN = {
    "loss": (
        "takes_tuples",
        "weights_samples",
        "needs_labels",
        "takes_references",
        "supports_cross_batch_memory",
        "supports_distributed_wrapper",
        "cosine_only",
        "supports_weight_regularizer",
        "syncs_device",
    ),
    "miner": ("needs_labels", "takes_references", "cosine_only", "syncs_device"),
    "regularizer": ("needs_labels", "syncs_device"),
    "knn_func": (),
}


def all_facts() -> dict[str, dict[str, str]]:
    """For each component's name, what is known about it and the value."""
    return {row.name: facts(row) for row in COMPONENTS}


def facts(row: Component) -> dict[str, str]:
    instance = row.make(collect_stats=True) if row.kind != "knn_func" else row.make()
    found = {}
    if hasattr(instance, "distance"):
        found["Default distance"] = type(instance.distance).__name__
    if hasattr(instance, "get_default_reducer"):
        found["Default reducer"] = type(instance.get_default_reducer()).__name__
        inputs = reducer_inputs(row, instance)
        if inputs:
            found["Reducer input"] = inputs
    statistics = getattr(instance, "_record_these_stats", [])
    if statistics:
        found["Statistics for the log"] = ", ".join(statistics)
    meanings = Component.capabilities()
    return found | {meanings[c]: "yes" if getattr(row, c) else "no" for c in SHOWN[row.kind]}


def reducer_inputs(row: Component, instance: Any) -> str:
    """The sub-losses that the reducer gets, and whether each has a value per sample or per pair."""
    words = {
        "already_reduced": "batch",
        "element": "sample",
        "pos_pair": "positive pair",
        "neg_pair": "negative pair",
    }
    found: list[str] = []
    reduce = instance.reducer.forward

    def record(losses: dict[str, dict[str, Any]], *args: Any) -> Any:
        for name, sub_loss in losses.items():
            kind = sub_loss["reduction_type"]
            found.append(f"{name}: one value per {words.get(kind, kind)}")
        return reduce(losses, *args)

    instance.reducer.forward = record
    row.call(instance, torch.randn(12, 8), torch.arange(12) // 4)
    return ", ".join(found)


if __name__ == "__main__":
    FILE.write_text(json.dumps(all_facts(), indent=1) + "\n")
