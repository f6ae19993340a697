"""What the documentation states about the components, generated from the conformance table.

`make facts` writes the facts on the components' pages to docs/_data/components.json, and updates
the table of losses in README.md and docs/plugs-in.md.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch

from pml_extras import losses

from .capabilities import Component
from .components import COMPONENTS

ROOT = Path(__file__).parents[2]
FILE = ROOT / "docs" / "_data" / "components.json"
PAGES = [ROOT / "README.md", ROOT / "docs" / "plugs-in.md"]
TABLE = re.compile(r"^\| \| a miner's tuples \|.*?(?=\n\n)", re.MULTILINE | re.DOTALL)
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

    def record(sub_losses: dict[str, dict[str, Any]], *args: Any) -> Any:
        for name, sub_loss in sub_losses.items():
            kind = sub_loss["reduction_type"]
            found.append(f"{name}: one value per {words.get(kind, kind)}")
        return reduce(sub_losses, *args)

    instance.reducer.forward = record
    row.call(instance, torch.randn(12, 8), torch.arange(12) // 4)
    return ", ".join(found)


def loss_table() -> str:
    """The README's table of what the losses can be combined with."""
    lines = [
        "| | a miner's tuples | `ref_emb` | `DistributedLossWrapper(loss)` | `efficient=True` |"
        " memories | distances | labels |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in COMPONENTS:
        if row.kind == "loss" and row.name in losses.__all__:
            tuples = "weight samples" if row.weights_samples else "choose pairs"
            references = "yes" if row.takes_references else "refused"
            cells = [
                f"`{row.name}`",
                tuples if row.takes_tuples else "refused",
                "the teacher's" if row.needs_teacher_embeddings else references,
                "yes" if row.supports_distributed_wrapper else "refused",
                references if row.supports_distributed_wrapper else "refused",
                "yes" if row.supports_cross_batch_memory else "refused",
                "cosine" if row.cosine_only else "any",
                "needed" if row.needs_labels else "not needed",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    FILE.write_text(json.dumps(all_facts(), indent=1) + "\n")
    for page in PAGES:
        page.write_text(TABLE.sub(loss_table(), page.read_text()))
