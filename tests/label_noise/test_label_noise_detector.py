from __future__ import annotations

import csv
import warnings
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from pytorch_metric_learning.losses import ContrastiveLoss
from pytorch_metric_learning.samplers import MPerClassSampler
from pytorch_metric_learning.testers import GlobalEmbeddingSpaceTester
from pytorch_metric_learning.trainers import MetricLossOnly
from torch import nn
from torch.nn.functional import one_hot
from torch.utils.data import TensorDataset

from helpers.state import same_state, state_of
from pml_extras.functional import label_vote
from pml_extras.label_noise import LabelNoiseDetector

N = 40


@pytest.fixture
def labels():
    return torch.arange(N) % 4


def embeddings(labels):
    return one_hot(labels).float() + 0.1 * torch.randn(len(labels), 4)


def test_scores_are_means_over_the_updates(labels):
    detector, votes = LabelNoiseDetector(labels, num_neighbors=6), []
    for _ in range(3):
        x = torch.randn(N, 4)
        votes.append(label_vote(x, labels, num_neighbors=6))
        detector.update(x)
    assert detector.num_updates == 3
    assert torch.allclose(detector.scores, torch.stack([v.vote_lift for v in votes]).mean(0))
    assert torch.equal(detector.suggested_labels, votes[-1].suggested_label)


def test_flags_nothing_before_the_first_update(labels):
    assert len(LabelNoiseDetector(labels).find_label_issues()) == 0


def test_flags_wrong_labels_most_suspicious_first(labels):
    noisy_labels = labels.clone()
    noisy_labels[[3, 17, 30]] = (noisy_labels[[3, 17, 30]] + 1) % 4
    detector = LabelNoiseDetector(noisy_labels, num_neighbors=8)
    for _ in range(2):
        detector.update(embeddings(labels))
    issues = detector.find_label_issues()
    assert set(issues.tolist()) == {3, 17, 30}
    assert (detector.scores[issues].diff() >= 0).all()
    assert torch.equal(detector.suggested_labels, labels)


def test_a_loaded_state_dict_continues_the_updates(labels):
    x, y = torch.randn(2, N, 4)
    expected = LabelNoiseDetector(labels, num_neighbors=6).update(x).update(y)
    saved = LabelNoiseDetector(labels, num_neighbors=6).update(x)
    loaded = LabelNoiseDetector(labels, num_neighbors=6)
    loaded.load_state_dict(saved.state_dict())
    loaded.update(y)
    assert same_state(state_of(loaded), state_of(expected))


def test_a_state_of_other_labels_is_refused(labels):
    saved = LabelNoiseDetector(labels, num_neighbors=6).update(embeddings(labels))
    corrected = LabelNoiseDetector(labels.flip(0), num_neighbors=6)
    before = state_of(corrected)
    with pytest.raises(RuntimeError, match="the saved labels are not the labels of this detector"):
        corrected.load_state_dict(saved.state_dict())
    assert same_state(state_of(corrected), before)


NAMES = np.array(["ant", "bee", "cat", "dog"])
FORMS = {
    "list": lambda names: names.tolist(),
    "array": lambda names: names,
    "objects": lambda names: names.astype(object),
    "series": lambda names: pd.Series(names, index=np.arange(len(names))[::-1] * 7),
    "categories": lambda names: pd.Series(names, dtype="category"),
    "tuple": lambda names: tuple(names.tolist()),
}


@pytest.mark.parametrize("form", FORMS)
def test_labels_may_be_strings_of_any_form(labels, form, tmp_path):
    x = embeddings(labels)
    noisy_labels = labels.clone()
    noisy_labels[3] = 0
    detector = LabelNoiseDetector(FORMS[form](NAMES[noisy_labels.numpy()])).update(x)
    assert detector.find_label_issues().tolist() == [3]
    assert detector.suggested_labels.tolist() == NAMES[labels.numpy()].tolist()
    assert detector.labels[3] == "ant"
    detector.to_csv(tmp_path / "labels.csv")
    assert (tmp_path / "labels.csv").read_text().splitlines()[1].startswith("3,ant,")
    resumed = LabelNoiseDetector(FORMS[form](NAMES[noisy_labels.numpy()]))
    resumed.load_state_dict(detector.state_dict())
    assert resumed.suggested_labels[3] == "dog"


MISSING = {
    "None in a list": ["a", "b", None] * 10,
    "NaN in a list": ["a", "b", float("nan")] * 10,
    "NaN in a Series of bools": pd.Series([True, False, float("nan")] * 10, dtype=object),
    "NaN in an array of objects": np.array([float("nan"), 1.0, 2.0] * 10, object),
    "NA in a Series": pd.Series(["a", None] * 10, dtype="string"),
    "NaT": pd.Series(pd.to_datetime(["2020-01-01", None] * 10)),
    "masked": np.ma.array([1, 2, 3], mask=[0, 1, 0]),
}


@pytest.mark.parametrize("given", MISSING.values(), ids=MISSING)
def test_missing_labels_are_refused(given):
    with pytest.raises(ValueError, match="labels must not be"):
        LabelNoiseDetector(given)


@pytest.mark.parametrize("form", [list, np.asarray, pd.Series, torch.tensor])
def test_integer_labels_are_reported_as_a_tensor(labels, form):
    given = labels * 5 - 2
    detector = LabelNoiseDetector(form(given.tolist()))
    detector.update(embeddings(labels))
    assert torch.equal(detector.labels, given)
    assert torch.equal(detector.suggested_labels, given)


def test_a_large_number_of_neighbors_warns(labels):
    message = "is more than the classes of 40 of 40 samples have"
    with pytest.warns(UserWarning, match=message):
        LabelNoiseDetector(labels, num_neighbors=11)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LabelNoiseDetector(labels, num_neighbors=10)
        LabelNoiseDetector(labels)
        LabelNoiseDetector([])


def test_a_label_that_is_outvoted_in_few_updates_is_no_issue():
    """In a dominating class, the score of a right label is about 1."""
    labels = torch.tensor([0] * 20 + [1, 1])
    detector = LabelNoiseDetector(labels, num_neighbors=2)
    apart = one_hot(labels, 3).float()
    confused = apart.clone()
    confused[0] = confused[20]
    for x in (apart, apart, confused, apart):
        detector.update(x + 0.01 * torch.randn(22, 3))
    assert detector.scores[0] < 1
    assert detector.vote_margins[0] > 0
    assert not detector.is_issue[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_stay_in_float32(labels, dtype):
    x = embeddings(labels).to(dtype)
    narrow, expected = LabelNoiseDetector(labels).to(dtype), LabelNoiseDetector(labels)
    for _ in range(3):
        narrow.update(x)
        expected.update(x.float())
    assert narrow.scores.dtype == narrow.vote_margins.dtype == torch.float32
    assert same_state(state_of(narrow), state_of(expected))


def test_writes_a_csv_table(labels, tmp_path):
    noisy_labels = labels.clone()
    noisy_labels[3] = 0
    detector = LabelNoiseDetector(noisy_labels, num_neighbors=8).update(embeddings(labels))
    names = ["ant", 'bee, "busy"', "cat", "dog"]
    detector.to_csv(tmp_path / "named.csv", class_names=names)
    with open(tmp_path / "named.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted(int(row["sample"]) for row in rows) == list(range(N))
    assert rows[0] == {
        "sample": "3",
        "label": "ant",
        "score": f"{detector.scores[3].item():.4g}",
        "suggested_label": "dog",
        "is_issue": "1",
    }
    assert {row["is_issue"] for row in rows[1:]} == {"0"}
    assert {row["label"] for row in rows} == set(names)
    detector.to_csv(tmp_path / "plain.csv")
    assert (tmp_path / "plain.csv").read_text().splitlines()[1].startswith("3,0,")
    detector.to_csv(tmp_path / "files.csv", sample_names=[f"{i}.png" for i in range(N)])
    assert (tmp_path / "files.csv").read_text().splitlines()[1].startswith("3.png,0,")


def test_names_in_the_table_go_by_position(labels, tmp_path):
    detector = LabelNoiseDetector(labels).update(embeddings(labels))
    names = pd.Series([f"caf\udce9 {i}" for i in range(N)]).sample(frac=1, random_state=0)
    detector.to_csv(tmp_path / "labels.csv", sample_names=names, class_names=pd.Series(NAMES))
    rows = list(csv.reader((tmp_path / "labels.csv").open()))[1:]
    expected = {name.replace("\udce9", "\\udce9"): NAMES[i % 4] for i, name in enumerate(names)}
    assert {row[0]: row[1] for row in rows} == expected


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"sample_names": ["x"] * (N - 1)}, "39 sample_names for 40 samples"),
        ({"sample_names": ["x"] * (N + 1)}, "41 sample_names"),
        ({"class_names": ["x"] * 3}, "3 class_names and none for the label 3"),
    ],
)
def test_a_table_that_cannot_be_written_leaves_the_old_one(labels, tmp_path, kwargs, message):
    (tmp_path / "labels.csv").write_text("old")
    with pytest.raises(ValueError, match=message):
        LabelNoiseDetector(labels).to_csv(tmp_path / "labels.csv", **kwargs)
    with pytest.raises(ValueError, match="none for the label -1"):
        LabelNoiseDetector(labels - 1).to_csv(tmp_path / "labels.csv", class_names=NAMES)
    assert (tmp_path / "labels.csv").read_text() == "old"


@pytest.mark.parametrize("num_neighbors", [np.int64(5), 5.0, torch.tensor(5)], ids=repr)
def test_the_number_of_neighbors_may_be_a_number_of_another_type(labels, num_neighbors):
    detector = LabelNoiseDetector(labels, num_neighbors=num_neighbors)
    assert type(detector.num_neighbors) is int
    detector.update(embeddings(labels))
    with pytest.raises(ValueError, match="whole number"):
        LabelNoiseDetector(labels, num_neighbors=True)


def test_the_hook_takes_labels_of_the_testers_level(labels):
    x = embeddings(labels)
    dataset = TensorDataset(x, torch.stack([labels // 2, labels], dim=1))
    detector = LabelNoiseDetector(labels)
    tester = GlobalEmbeddingSpaceTester(dataloader_num_workers=0, label_hierarchy_level=1)
    models = {"trunk": nn.Identity(), "embedder": nn.Identity()}
    detector.end_of_epoch_hook(tester, dataset)(SimpleNamespace(models=models))
    assert detector.num_updates == 1


@pytest.mark.parametrize("hook_result", [None, False])
def test_the_hook_updates_each_epoch_and_returns_the_result_of_the_next_hook(labels, hook_result):
    dataset = TensorDataset(embeddings(labels), labels)
    detector = LabelNoiseDetector(labels, num_neighbors=8)
    tester = GlobalEmbeddingSpaceTester(dataloader_num_workers=0)
    epochs = []

    def hook(trainer):
        epochs.append(trainer.epoch)
        return hook_result

    network = nn.Linear(4, 3)
    trainer = MetricLossOnly(
        {"trunk": network},
        {"trunk_optimizer": torch.optim.SGD(network.parameters(), 0.1)},
        16,
        {"metric_loss": ContrastiveLoss()},
        dataset,
        sampler=MPerClassSampler(labels, 4, 16, N),
        dataloader_num_workers=0,
        end_of_epoch_hook=detector.end_of_epoch_hook(tester, dataset, hook),
    )
    trainer.train(num_epochs=2)
    assert epochs == ([1] if hook_result is False else [1, 2])
    assert detector.num_updates == len(epochs)
    expected = label_vote(network(dataset.tensors[0]), labels, num_neighbors=8)
    assert torch.equal(detector.suggested_labels, expected.suggested_label)


def test_the_hook_needs_no_next_hook_and_checks_the_labels(labels):
    dataset = TensorDataset(embeddings(labels), labels)
    detector = LabelNoiseDetector(labels, num_neighbors=8)

    class Trainer:
        models = {"trunk": nn.Linear(4, 3), "embedder": nn.Identity()}  # noqa: RUF012

    tester = GlobalEmbeddingSpaceTester(dataloader_num_workers=0)
    assert detector.end_of_epoch_hook(tester, dataset)(Trainer) is None
    relabeled = TensorDataset(dataset.tensors[0], labels.flip(0))
    with pytest.raises(ValueError, match="labels are not the labels"):
        detector.end_of_epoch_hook(tester, relabeled)(Trainer)
    assert detector.num_updates == 1


@pytest.mark.parametrize(
    ("labels", "num_neighbors", "message"),
    [
        (torch.rand(3), None, "labels must be N integers or other sortable values, got float32"),
        (torch.zeros(2, 3, dtype=torch.long), None, r"of shape \(2, 3\)"),
        ([["a"], ["b"]], None, r"of shape \(2, 1\)"),
        (None, None, r"of shape \(\)"),
        (np.array(["a", 1], object), None, "labels must be values that can be sorted"),
        (torch.arange(3), 0, "num_neighbors must be a whole number"),
    ],
)
def test_invalid_arguments_are_reported(labels, num_neighbors, message):
    with pytest.raises(ValueError, match=message):
        LabelNoiseDetector(labels, num_neighbors=num_neighbors)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.randn(3, 4), "of 40 samples, got 3"),
        (torch.randn(N), "shape"),
        (torch.full((N, 4), torch.nan), "finite, and row 0"),
    ],
)
def test_an_invalid_update_changes_nothing(labels, x, message):
    detector = LabelNoiseDetector(labels)
    with pytest.raises(ValueError, match=message):
        detector.update(x)
    assert detector.num_updates == 0
