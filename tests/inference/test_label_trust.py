from __future__ import annotations

import csv

import pytest
import torch
from pytorch_metric_learning.losses import ContrastiveLoss
from pytorch_metric_learning.samplers import MPerClassSampler
from pytorch_metric_learning.testers import GlobalEmbeddingSpaceTester
from pytorch_metric_learning.trainers import MetricLossOnly
from torch import nn
from torch.nn.functional import one_hot
from torch.utils.data import TensorDataset

from pml_extras.functional import label_vote
from pml_extras.inference import LabelTrust

N = 40


@pytest.fixture
def labels():
    return torch.arange(N) % 4


def embeddings(labels):
    return one_hot(labels).float() + 0.1 * torch.randn(len(labels), 4)


def test_averages_its_looks(labels):
    trust, seen = LabelTrust(labels, num_neighbors=6), []
    for _ in range(3):
        x = torch.randn(N, 4)
        seen.append(label_vote(x, labels, 6))
        trust.look(x)
    assert trust.looks == 3
    assert torch.allclose(trust.support, torch.stack([v.support for v in seen]).mean(0))
    assert torch.allclose(trust.trusted, torch.stack([v.trusted for v in seen]).float().mean(0))
    assert torch.equal(trust.winner, seen[-1].winner)


def test_distrusts_nothing_before_it_looks(labels):
    assert len(LabelTrust(labels).distrusted()) == 0


def test_distrusts_wrong_labels_the_least_supported_first(labels):
    told = labels.clone()
    told[[3, 17, 30]] = (told[[3, 17, 30]] + 1) % 4
    trust = LabelTrust(told, num_neighbors=8)
    for _ in range(2):
        trust.look(embeddings(labels))
    found = trust.distrusted()
    assert set(found.tolist()) == {3, 17, 30}
    assert (trust.support[found].diff() >= 0).all()
    assert torch.equal(trust.winner, labels)


def test_goes_on_where_it_stopped(labels):
    x, y = torch.randn(2, N, 4)
    whole = LabelTrust(labels, 6).look(x).look(y)
    first = LabelTrust(labels, 6).look(x)
    second = LabelTrust(torch.zeros(N, dtype=torch.long), 6)
    second.load_state_dict(first.state_dict())
    second.look(y)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])


def test_writes_a_table(labels, tmp_path):
    told = labels.clone()
    told[3] = 0
    trust = LabelTrust(told, num_neighbors=8).look(embeddings(labels))
    names = ["ant", 'bee, "busy"', "cat", "dog"]
    trust.write_csv(tmp_path / "named.csv", names)
    with open(tmp_path / "named.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted(int(row["sample"]) for row in rows) == list(range(N))
    assert rows[0] == {
        "sample": "3",
        "label": "ant",
        "support": f"{trust.support[3].item():.4g}",
        "trusted": "0",
        "winner": "dog",
        "distrusted": "1",
    }
    assert {row["distrusted"] for row in rows[1:]} == {"0"}
    assert {row["label"] for row in rows} == set(names)
    trust.write_csv(tmp_path / "plain.csv")
    assert (tmp_path / "plain.csv").read_text().splitlines()[1].startswith("3,0,")
    trust.write_csv(tmp_path / "files.csv", samples=[f"{i}.png" for i in range(N)])
    assert (tmp_path / "files.csv").read_text().splitlines()[1].startswith("3.png,0,")


@pytest.mark.parametrize("answer", [None, False])
def test_hook_looks_at_each_epoch_and_passes_on_what_the_next_says(labels, answer):
    dataset = TensorDataset(embeddings(labels), labels)
    trust = LabelTrust(labels, num_neighbors=8)
    tester = GlobalEmbeddingSpaceTester(dataloader_num_workers=0)
    called = []

    def hook(trainer):
        called.append(trainer.epoch)
        return answer

    network = nn.Linear(4, 3)
    trainer = MetricLossOnly(
        {"trunk": network},
        {"trunk_optimizer": torch.optim.SGD(network.parameters(), 0.1)},
        16,
        {"metric_loss": ContrastiveLoss()},
        dataset,
        sampler=MPerClassSampler(labels, 4, 16, N),
        dataloader_num_workers=0,
        end_of_epoch_hook=trust.end_of_epoch_hook(tester, dataset, hook),
    )
    trainer.train(num_epochs=2)
    assert called == ([1] if answer is False else [1, 2])
    assert trust.looks == len(called)
    expected = label_vote(network(dataset.tensors[0]), labels, 8)
    assert torch.equal(trust.winner, expected.winner)


def test_hook_needs_no_next(labels):
    dataset = TensorDataset(embeddings(labels), labels)
    trust = LabelTrust(labels, num_neighbors=8)

    class Trainer:
        models = {"trunk": nn.Linear(4, 3), "embedder": nn.Identity()}  # noqa: RUF012

    tester = GlobalEmbeddingSpaceTester(dataloader_num_workers=0)
    assert trust.end_of_epoch_hook(tester, dataset)(Trainer) is None
    other = TensorDataset(dataset.tensors[0], labels.flip(0))
    with pytest.raises(ValueError, match="labels are not those"):
        trust.end_of_epoch_hook(tester, other)(Trainer)
    assert trust.looks == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.rand(3),), "labels must be N integers, got torch.float32"),
        ((torch.zeros(2, 3, dtype=torch.long),), r"of shape \(2, 3\)"),
        ((torch.arange(3), 0), "num_neighbors must be a whole number"),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        LabelTrust(*arguments)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.randn(3, 4), "of 40 samples, got 3"),
        (torch.randn(N), "shape"),
        (torch.full((N, 4), torch.nan), "finite, and row 0"),
    ],
)
def test_a_wrong_look_changes_nothing(labels, wrong, message):
    trust = LabelTrust(labels)
    with pytest.raises(ValueError, match=message):
        trust.look(wrong)
    assert trust.looks == 0
