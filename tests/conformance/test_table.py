"""Contracts on the table itself: that nothing public is left out of it."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest
from torch import nn

from pml_extras import distillation, inference, label_noise, losses, miners, regularizers

from .capabilities import Component
from .components import COMPONENTS
from .facts import FILE, all_facts

PUBLIC = [
    getattr(package, name)
    for package in (losses, regularizers, distillation, miners, inference, label_noise)
    for name in package.__all__
]
NO_ROW = {
    # It takes two views and no labels: all rows that go in memories are put into it instead.
    losses.SelfSupervisedLoss,
    # It lives in a process group only, where its own tests compare it with CenterContrastiveLoss.
    losses.ShardedCenterContrastiveLoss,
    # It takes part in no training step.
    label_noise.LabelNoiseDetector,
}


def parts(thing):
    """A component, all modules in it, and what they hold that is no module: the teachers."""
    modules = list(thing.modules()) if isinstance(thing, nn.Module) else [thing]
    return modules + [module.teacher for module in modules if hasattr(module, "teacher")]


@pytest.mark.parametrize("public", PUBLIC, ids=lambda public: public.__name__)
def test_every_public_class_is_in_a_row(public):
    in_rows = any(
        isinstance(part, public) for component in COMPONENTS for part in parts(component.make())
    )
    assert in_rows != (public in NO_ROW)


def test_every_capability_has_a_meaning():
    names = {field.name for field in fields(Component)} - {"name", "kind", "factory"}
    assert Component.capabilities().keys() == names


def test_no_row_contradicts_itself():
    for component in COMPONENTS:
        assert component.takes_tuples or not component.weights_samples


def test_names_tell_rows_apart():
    assert len({component.name for component in COMPONENTS}) == len(COMPONENTS)


def combinations() -> str:
    """What the README says of the losses, from the table."""
    lines = [
        "| | a miner's tuples | references | processes | memories | distances | labels |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in COMPONENTS:
        if row.kind == "loss" and row.name in losses.__all__:
            tuples = "weight samples" if row.weights_samples else "choose pairs"
            cells = [
                f"`{row.name}`",
                tuples if row.takes_tuples else "refused",
                "yes" if row.takes_references else "refused",
                "yes" if row.goes_in_distributed_wrapper else "refused",
                "yes" if row.supports_cross_batch_memory else "refused",
                "cosine" if row.cosine_only else "any",
                "needed" if row.needs_labels else "not needed",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


@pytest.mark.parametrize("page", ["README.md", "docs/plugs-in.md"])
def test_the_pages_say_what_goes_together(page):
    text = (Path(__file__).parents[2] / page).read_text()
    assert combinations() in text, combinations()


def test_documented_facts_are_up_to_date():
    assert json.loads(FILE.read_text()) == all_facts(), "update the file with `make facts`"
