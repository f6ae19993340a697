"""The conformance table is complete, consistent, and the source of what the docs state."""

from __future__ import annotations

import json
from dataclasses import fields

import pytest
from torch import nn

from pml_extras import distillation, inference, label_noise, losses, miners, regularizers

from .capabilities import Component
from .components import COMPONENTS
from .facts import FILE, PAGES, TABLE, all_facts, loss_table

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
    assert in_rows != (public in NO_ROW), "it needs a row in components.py, or an entry in NO_ROW"


def test_every_capability_has_a_description():
    names = {field.name for field in fields(Component)} - {"name", "kind", "factory"}
    assert Component.capabilities().keys() == names


def test_rows_are_consistent():
    for component in COMPONENTS:
        assert component.takes_tuples or not component.weights_samples


def test_row_names_are_unique():
    assert len({component.name for component in COMPONENTS}) == len(COMPONENTS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_readme_and_docs_show_the_current_table(page):
    assert TABLE.findall(page.read_text()) == [loss_table()], "update the page with `make facts`"


def test_documented_facts_are_up_to_date():
    assert json.loads(FILE.read_text()) == all_facts(), "update the file with `make facts`"
