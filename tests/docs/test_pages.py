"""The examples in the README and the docs run, links and figures exist, and nothing is missing."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pytorch_metric_learning.losses import TripletMarginLoss
from pytorch_metric_learning.testers import GlobalEmbeddingSpaceTester
from pytorch_metric_learning.trainers import MetricLossOnly
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from torch import nn
from torch.utils.data import TensorDataset

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [page for page in PAGES if "_build" not in page.parts]
EXAMPLE = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


class LabeledDataset(TensorDataset):
    @property
    def labels(self):
        return self.tensors[1]


def names_assumed_by_the_readme():
    """The variables that the README's examples use without defining them."""
    torch.manual_seed(0)
    labels = torch.arange(256) % 32
    dataset = LabeledDataset(torch.randn(256, 20), labels)
    trunk, embedder = nn.Linear(20, 32), nn.Linear(32, 64)
    models = {"trunk": trunk, "embedder": embedder}
    model = nn.Sequential(trunk, embedder)
    return {
        "AccuracyCalculator": AccuracyCalculator,
        "MetricLossOnly": MetricLossOnly,
        "torch": torch,
        "dataset": dataset,
        "dataset_dict": {"val": dataset},
        "batch_size": 64,
        "trunk": trunk,
        "embedder": embedder,
        "models": models,
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), 0.1),
        "optimizers": {},
        "embeddings": torch.randn(64, 64, requires_grad=True),
        "labels": labels[:64],
        "loss_func": TripletMarginLoss(),
        "tester": GlobalEmbeddingSpaceTester(dataloader_num_workers=0),
        "end_of_epoch_hook": lambda trainer: None,
        "hooks": SimpleNamespace(end_of_epoch_hook=lambda *arguments: lambda trainer: None),
        "folder": "logs",
    }


def examples(page):
    return EXAMPLE.findall(page.read_text())


def needs_processes(example):
    """Whether the example needs several processes. Other tests run it in two and four."""
    return "ShardedCenterContrastiveLoss" in example


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_examples_run(page, tmp_path, monkeypatch):
    if page.name == "upstream.md":
        pytest.skip("tests/upstream runs its examples, each on its own")
    monkeypatch.chdir(tmp_path)
    names = names_assumed_by_the_readme() if page.name == "README.md" else {}
    for example in examples(page):
        if needs_processes(example):
            continue
        # The README's examples are independent, those of a page build on each other.
        namespace = dict(names) if page.name == "README.md" else names
        exec(compile(example, str(page), "exec"), namespace)


def test_component_pages_have_examples():
    pages = [page for page in PAGES if page.parent.name == "components" or page.name == "README.md"]
    # A sharded loss needs a process group, so its page refers to a script.
    assert [page.name for page in pages if not examples(page)] == ["sharded-centers.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_link_targets_exist(page):
    for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_every_component_has_a_page():
    from pml_extras import distillation, inference, label_noise, losses, miners, regularizers

    text = "".join(page.read_text() for page in (ROOT / "docs" / "components").iterdir())
    wrappers = {"CrossBatchMemory", "SelfSupervisedLoss"}  # documented on ContextualLoss's page
    missing = []
    for package in (losses, regularizers, distillation, miners, inference, label_noise):
        for name in set(package.__all__) - wrappers:
            directive = f".. autoclass:: {package.__name__}.{name}\n"
            if directive not in text:
                missing.append(directive)
    assert not missing


def test_the_script_draws_the_figures_of_the_pages(tmp_path):
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        import pictures
    finally:
        sys.path.pop(0)
    pictures.main(tmp_path)
    drawn = {path.name for path in tmp_path.iterdir()}
    text = "".join(page.read_text() for page in PAGES)
    assert drawn == {name for name in drawn if f"figures/{name}" in text}
    assert all((ROOT / "docs" / "figures" / name).exists() for name in drawn)
