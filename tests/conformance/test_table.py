"""The conformance table is complete, consistent, and the source of what the docs state."""

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
    # It takes two views instead of labels. test_combinations wraps all rows that it supports.
    losses.SelfSupervisedLoss,
    # It needs a process group. Its own tests compare it with CenterContrastiveLoss.
    losses.ShardedCenterContrastiveLoss,
    # It is not part of a training step.
    label_noise.LabelNoiseDetector,
}


def parts(instance):
    """A component, all modules in it, and their teachers, which are no submodules."""
    modules = list(instance.modules()) if isinstance(instance, nn.Module) else [instance]
    return modules + [module.teacher for module in modules if hasattr(module, "teacher")]


@pytest.mark.parametrize("public", PUBLIC, ids=lambda public: public.__name__)
def test_every_public_class_is_in_a_row(public):
    in_rows = any(
        isinstance(part, public) for component in COMPONENTS for part in parts(component.make())
    )
    assert in_rows != (public in NO_ROW)


def test_every_capability_has_a_description():
    names = {field.name for field in fields(Component)} - {"name", "kind", "factory"}
    assert Component.capabilities().keys() == names


def test_rows_are_consistent():
    for component in COMPONENTS:
        assert component.takes_tuples or not component.weights_samples


def test_row_names_are_unique():
    assert len({component.name for component in COMPONENTS}) == len(COMPONENTS)


def combinations() -> str:
    """The README's table of what the losses can be combined with."""
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
                "yes" if row.supports_distributed_wrapper else "refused",
                "yes" if row.supports_cross_batch_memory else "refused",
                "cosine" if row.cosine_only else "any",
                "needed" if row.needs_labels else "not needed",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


@pytest.mark.parametrize("page", ["README.md", "docs/plugs-in.md"])
def test_readme_and_docs_show_the_current_table(page):
    text = (Path(__file__).parents[2] / page).read_text()
    assert combinations() in text, combinations()


def test_documented_facts_are_up_to_date():
    assert json.loads(FILE.read_text()) == all_facts(), "update the file with `make facts`"
