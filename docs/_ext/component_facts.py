"""`{component} NAME`: what a component, and the table of the conformance tests, say of it."""

from __future__ import annotations

from typing import Any

import torch
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from conformance.capabilities import Component
from conformance.components import COMPONENTS

# Those that users choose by. The others are about how contracts are to be tested.
SHOWN = {
    "loss": (
        "takes_tuples",
        "weights_samples",
        "needs_labels",
        "takes_references",
        "supports_cross_batch_memory",
        "goes_in_distributed_wrapper",
        "cosine_only",
        "regularizes_weights",
        "syncs_device",
    ),
    "miner": ("needs_labels", "takes_references", "cosine_only", "syncs_device"),
    "regularizer": ("needs_labels", "syncs_device"),
    "knn_func": (),
}


class ComponentFacts(SphinxDirective):
    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        name = self.arguments[0]
        row = next((c for c in COMPONENTS if c.name == name), None)
        if row is None:
            raise self.error(f"the table of components has no {name}")
        meanings = Component.capabilities()
        answers = [(meanings[c], "yes" if getattr(row, c) else "no") for c in SHOWN[row.kind]]
        return [table(facts(row) + answers)]


def facts(row: Component) -> list[tuple[str, str]]:
    thing = row.make(collect_stats=True) if row.kind != "knn_func" else row.make()
    found = []
    if hasattr(thing, "distance"):
        found.append(("Default distance", type(thing.distance).__name__))
    if hasattr(thing, "get_default_reducer"):
        found.append(("Default reducer", type(thing.get_default_reducer()).__name__))
        inputs = ", ".join(f"{name}: one value per {kind}" for name, kind in reductions(row, thing))
        if inputs:
            found.append(("Reducer input", inputs))
    statistics = getattr(thing, "_record_these_stats", [])
    if statistics:
        found.append(("Statistics for the log", ", ".join(statistics)))
    return found


def reductions(row: Component, thing: Any) -> list[tuple[str, str]]:
    """The sub-losses that a reducer is given, and what they have one value for."""
    seen: list[tuple[str, str]] = []
    reduce = thing.reducer.forward

    def look(losses: dict[str, dict[str, Any]], *arguments: Any) -> Any:
        seen.extend((name, what["reduction_type"]) for name, what in losses.items())
        return reduce(losses, *arguments)

    thing.reducer.forward = look
    row.call(thing, torch.randn(12, 8), torch.arange(12) // 4)
    words = {"already_reduced": "batch", "pos_pair": "positive pair", "neg_pair": "negative pair"}
    return [(name, words.get(kind, kind)) for name, kind in seen]


def table(body: list[tuple[str, str]]) -> nodes.table:
    rows = nodes.tbody()
    for cells in body:
        rows += nodes.row("", *(nodes.entry("", nodes.paragraph(text=cell)) for cell in cells))
    widths = [nodes.colspec(colwidth=width) for width in (60, 40)]
    return nodes.table("", nodes.tgroup("", *widths, rows, cols=2))


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("component", ComponentFacts)
    return {"parallel_read_safe": True}
