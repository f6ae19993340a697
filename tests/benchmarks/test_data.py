"""The data of an experiment: splits, conditions and batches, and that no test class leaks."""

from __future__ import annotations

import gc
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from images import UserError
from samples import Samples

from benchmarks.evidence import data, execute, sweep
from benchmarks.evidence.components import Sizes
from benchmarks.evidence.conditions import CONDITIONS, Experiment, Scenario
from benchmarks.evidence.data import load_test, load_train
from benchmarks.evidence.methods import METHODS
from benchmarks.evidence.presets import PRESETS
from benchmarks.evidence.records import Results

UNSEEN = set(range(60, 80))
DATA_ROOT = os.environ.get("PML_EXTRAS_DATA", "")


def classes(images: Samples) -> set[int]:
    """The true classes, from the pixels."""
    return set(images.source[:, 0, 0, 0].tolist())


def tensors_within(root):
    """All tensors that can be reached from an object."""
    seen, stack = {id(root)}, [root]
    while stack:
        current = stack.pop()
        if isinstance(current, torch.Tensor):
            yield current
        for other in gc.get_referents(current):
            if id(other) not in seen and not isinstance(other, type):
                seen.add(id(other))
                stack.append(other)


@pytest.fixture
def no_test_data(monkeypatch):
    def load_test(*arguments):
        raise AssertionError("selection loaded test classes")

    monkeypatch.setattr(execute, "load_test", load_test)


@pytest.mark.usefixtures("no_test_data")
@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("init", ["scratch", "finetune"])
def test_selection_cannot_see_test_classes(init, condition, omniglot, tmp_path, monkeypatch):
    seen = []

    def train(preset, experiment, hparams, seed, train_data, runtime):
        seen.append((train_data, hparams))
        return execute.TrainedModel(torch.nn.Flatten(), None, None, {})

    monkeypatch.setattr(execute, "train", train)
    experiment = Experiment("omniglot", init, condition, "triplet")
    hparams = METHODS["triplet"].draw(0)
    runtime = execute.Runtime(omniglot, tmp_path)
    record = execute.run_trial(PRESETS["smoke"], experiment, hparams, 0, runtime)
    assert not {"test", "history"} & record.keys()
    tensors = list(tensors_within(seen[0]))
    assert len(tensors) >= 2  # the search did reach the images
    for tensor in tensors:
        # The whole storage, because the tensor may be a view of a part of it.
        storage = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
        assert not UNSEEN & set(storage.unique().tolist())


@pytest.mark.usefixtures("no_test_data")
def test_selection_runs_without_loading_test_data(omniglot, tmp_path):
    preset = PRESETS["smoke"]
    results = Results(preset, [])
    experiment = Experiment("omniglot", "scratch", "clean", "contrastive")
    jobs = [sweep.Job(experiment, trial=trial) for trial in range(preset.trials)]
    runtime = execute.Runtime(omniglot, tmp_path)
    failures = sweep.sweep(jobs, results, runtime, lambda record: None)
    assert failures == []
    assert results.selected(experiment) in [METHODS["contrastive"].draw(t) for t in range(2)]


def test_training_validation_and_test_have_no_class_in_common(omniglot):
    test = classes(load_test(Scenario("omniglot", "scratch", "clean"), 0, omniglot).images)
    assert test == UNSEEN
    parts = {s: load_train(Scenario("omniglot", s, "clean"), 0, omniglot) for s in
             ("scratch", "pretraining", "finetune")}  # fmt: skip
    validation = classes(parts["scratch"].validation)
    assert validation == {c for c in range(60) if c % 10 in (4, 9)}  # of every alphabet
    assert classes(parts["scratch"].images) == set(range(60)) - validation
    halves = [classes(parts[s].images) for s in ("pretraining", "finetune")]
    assert halves[0] | halves[1] == classes(parts["scratch"].images)
    assert not halves[0] & halves[1]
    assert len(halves[0]) == len(halves[1])
    for part in parts.values():
        assert classes(part.validation) == validation
        assert set(part.images.labels) == set(range(len(part.images.names)))
        name = part.images.names[part.images.labels[0]]
        number = int(part.images.source[0, 0, 0, 0])
        assert name == f"alphabet{number // 10}/character{number % 10}"


@pytest.mark.parametrize("condition", ["noise10", "noise30", "noise50"])
def test_noise_is_symmetric_and_on_training_labels_only(condition, omniglot):
    clean = load_train(Scenario("omniglot", "scratch", "clean"), 3, omniglot)
    noisy = load_train(Scenario("omniglot", "scratch", condition), 3, omniglot)
    assert noisy.true_labels == clean.images.labels
    assert noisy.validation.labels == clean.validation.labels
    assert torch.equal(noisy.images.source, clean.images.source)
    labels, true = np.array(noisy.images.labels), np.array(noisy.true_labels)
    wrong = labels != true
    assert wrong.sum() == round(CONDITIONS[condition].noise * len(true))
    shift = (labels - true)[wrong] % 48  # uniform over the 47 other classes
    counts = np.bincount(shift, minlength=48)[1:]
    expected = wrong.sum() / 47
    assert ((counts - expected) ** 2 / expected).sum() < 85  # chi squared, 46 degrees: p < 0.0005
    again = load_train(Scenario("omniglot", "scratch", condition), 3, omniglot)
    other = load_train(Scenario("omniglot", "scratch", condition), 4, omniglot)
    assert noisy.images.labels == again.images.labels != other.images.labels


@pytest.mark.parametrize(("condition", "left"), [("withheld50", 10), ("withheld75", 5)])
def test_the_same_fraction_of_each_class_is_withheld(condition, left, omniglot):
    train = load_train(Scenario("omniglot", "scratch", condition), 0, omniglot)
    assert set(Counter(train.images.labels).values()) == {left}
    assert len(train.validation) == 12 * 20
    assert train.true_labels == train.images.labels


def test_the_long_tail_is_over_alphabets(omniglot):
    train = load_train(Scenario("omniglot", "scratch", "long_tail"), 5, omniglot)
    test = load_test(Scenario("omniglot", "scratch", "long_tail"), 5, omniglot)
    counts = Counter(train.images.labels)
    by_alphabet = {}
    for label, name in enumerate(train.images.names):
        by_alphabet.setdefault(data.alphabet(name), set()).add(counts[label])
    assert all(len(sizes) == 1 for sizes in by_alphabet.values())  # equal within an alphabet
    sizes = {alphabet: sizes.pop() for alphabet, sizes in by_alphabet.items()}
    geometric = [np.ceil(20 * 20 ** (-rank / 5) - 1e-9) for rank in range(6)]
    assert sorted(sizes.values(), reverse=True) == geometric
    assert geometric[0] == 20
    assert geometric[-1] == 1
    # The test classes are of the same alphabets, but in neither training nor validation.
    assert not classes(test.images) & (classes(train.images) | classes(train.validation))
    assert classes(test.images) < set(range(60))
    rare = {data.alphabet(test.images.names[label]) for label in test.rare}
    assert rare == set(sorted(sizes, key=sizes.get)[:2])  # a third of six
    order = load_train(Scenario("omniglot", "scratch", "long_tail"), 6, omniglot)
    assert Counter(order.images.labels) != counts


def test_classification_tests_on_the_official_test_images(cifar100):
    train = load_train(Scenario("cifar100_classes", "scratch", "clean"), 0, cifar100)
    test = load_test(Scenario("cifar100_classes", "scratch", "clean"), 0, cifar100).images
    assert set(Counter(test.labels).values()) == {100}
    assert classes(test) == {255}
    for tensor in tensors_within(train):
        assert 255 not in tensor
    assert set(train.images.labels) == set(train.validation.labels) == set(range(8))
    assert Counter(train.images.labels)[0] == 8
    assert Counter(train.validation.labels)[0] == 2


def test_fine_tuned_classification_uses_half_of_the_classes(cifar100):
    parts = {s: load_train(Scenario("cifar100_classes", s, "clean"), 0, cifar100) for s in
             ("scratch", "pretraining", "finetune")}  # fmt: skip
    halves = [classes(parts[s].images) for s in ("pretraining", "finetune")]
    assert halves[0] | halves[1] == classes(parts["scratch"].images)
    assert len(halves[0]) == len(halves[1]) == 4
    test = load_test(Scenario("cifar100_classes", "finetune", "clean"), 0, cifar100).images
    assert test.names == parts["finetune"].images.names == parts["finetune"].validation.names
    assert Counter(test.labels) == dict.fromkeys(range(4), 100)
    assert classes(test) == {255}
    for part in parts.values():
        assert all(255 not in tensor for tensor in tensors_within(part))


@pytest.mark.parametrize("condition", CONDITIONS)
def test_pretraining_uses_no_class_of_fine_tuning_or_testing(
    condition, omniglot, tmp_path, monkeypatch
):
    loaded = []

    def load(*arguments):
        loaded.append(load_train(*arguments))
        return loaded[0]

    monkeypatch.setattr(execute, "load_train", load)
    monkeypatch.setattr(execute.training, "fit", lambda *arguments: {})
    experiment = Experiment("omniglot", "finetune", condition, "triplet")
    execute.pretrained(PRESETS["smoke"], experiment, 0, execute.Runtime(omniglot, tmp_path))
    (before,) = loaded
    after = load_train(Scenario("omniglot", "finetune", condition), 0, omniglot)
    test = load_test(Scenario("omniglot", "finetune", condition), 0, omniglot)
    later = classes(after.images) | classes(after.validation) | classes(test.images)
    assert len(classes(before.images)) >= 18
    assert not classes(before.images) & later
    assert before.images.labels == before.true_labels


def test_batches_are_balanced_or_random(omniglot):
    images = load_train(Scenario("omniglot", "scratch", "clean"), 0, omniglot).images
    sizes = METHODS["triplet"].sizes(48, 64, 64)
    batches = data.Batches(images, sizes, True, 3, torch.device("cpu"))
    assert len(batches) == 3
    for pixels, labels in batches:
        assert pixels.shape == (64, 1, 28, 28)
        assert set(Counter(labels.tolist()).values()) == {4}
        numbers = ((pixels[:, 0, 0, 0] + 1) * 127.5).round().long().tolist()
        names = [images.names[label] for label in labels]
        assert names == [f"alphabet{n // 10}/character{n % 10}" for n in numbers]
    square = METHODS["smooth_ap"].sizes(48, 64, 64)
    assert (square.samples_per_class, square.batch_size) == (8, 64)
    drawn = data.Batches(images, sizes, False, 15, torch.device("cpu"))
    assert max(Counter(torch.cat([labels for _, labels in drawn]).tolist()).values()) == 20


@pytest.mark.skipif(
    not (DATA_ROOT and Path(DATA_ROOT, "omniglot28.npz").is_file()),
    reason="needs omniglot28.npz in the directory that PML_EXTRAS_DATA names",
)
def test_the_real_splits():
    train = load_train(Scenario("omniglot", "scratch", "clean"), 0, Path(DATA_ROOT))
    test = load_test(Scenario("omniglot", "scratch", "clean"), 0, Path(DATA_ROOT)).images
    assert len(train.images.names) + len(train.validation.names) == 964
    assert len(test.names) == 659
    assert not set(test.names) & {*train.images.names, *train.validation.names}


@pytest.mark.parametrize("balanced", [True, False])
def test_batches_exclude_images(balanced):
    images = Samples(
        torch.arange(40, dtype=torch.uint8).view(-1, 1, 1, 1), [i % 4 for i in range(40)],
        list("abcd"),
    )  # fmt: skip
    sizes = Sizes(num_classes=4, embedding_size=2, samples_per_class=2, batch_size=8)
    batches = data.Batches(images, sizes, balanced, 30, torch.device("cpu"))

    def drawn():
        pixels, labels = zip(*batches, strict=True)
        numbers = ((torch.cat(pixels).flatten() + 1) * 127.5).round().long()
        assert torch.equal(numbers % 4, torch.cat(labels))
        return set(numbers.tolist())

    assert drawn() == set(range(40))
    batches.exclude([3, 7, 8])
    assert drawn() == set(range(40)) - {3, 7, 8}
    batches.exclude([0])
    assert drawn() == set(range(1, 40))
    assert len(batches) == 30


def test_a_missing_data_root_is_one_clear_error(tmp_path):
    data.check_data_root(None, ["digits"])
    data.check_data_root(tmp_path, ["omniglot"])
    for root, problem in ((None, "omniglot needs"), (tmp_path / "none", "there is no directory")):
        with pytest.raises(UserError, match=f"{problem}.*--data-root DIR or set PML_EXTRAS_DATA"):
            data.check_data_root(root, ["digits", "omniglot"])
