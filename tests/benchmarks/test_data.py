"""What training is given: the right images, spoilt as declared, and none of a test class."""

from __future__ import annotations

import gc
from collections import Counter

import numpy as np
import pytest
import torch
from datasets import Images

from benchmarks.evidence import data, run
from benchmarks.evidence.data import load_test, load_training
from benchmarks.evidence.plan import CONDITIONS, METHODS, PRESETS, Cell, Sizes

UNSEEN = set(range(60, 80))
ALL = [(start, condition) for start in ("scratch", "finetune") for condition in CONDITIONS]


def classes(images: Images) -> set[int]:
    """By the images themselves, whatever their labels say."""
    return set(images.source[:, 0, 0, 0].tolist())


def tensors_within(root):
    """Every tensor that can be reached from an object."""
    seen, waiting = {id(root)}, [root]
    while waiting:
        thing = waiting.pop()
        if isinstance(thing, torch.Tensor):
            yield thing
        for other in gc.get_referents(thing):
            if id(other) not in seen and not isinstance(other, type):
                seen.add(id(other))
                waiting.append(other)


@pytest.mark.parametrize(("start", "condition"), ALL)
def test_selection_cannot_see_test_classes(start, condition, omniglot, tmp_path, monkeypatch):
    given = []

    def look(preset, cell, setting, seed, training, where):
        given.append((training, setting))
        return run.Trained(torch.nn.Flatten(), None, None, {})

    def load_test(*arguments):
        raise AssertionError("selection asked for test classes")

    monkeypatch.setattr(run, "train", look)
    monkeypatch.setattr(run, "load_test", load_test)
    cell = Cell("omniglot", start, condition, "triplet")
    setting = METHODS["triplet"].draw(0)
    where = run.Where(omniglot, tmp_path)
    record = run.run_trial(PRESETS["smoke"], cell, setting, 0, where)
    assert not {"test", "history"} & record.keys()
    found = list(tensors_within(given[0]))
    assert len(found) >= 2  # the walk did reach the images
    for tensor in found:
        # What lies behind a tensor too, of which it may show a part only.
        everything = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
        assert not UNSEEN & set(everything.unique().tolist())


def test_a_whole_selection_runs_without_the_test_loader(omniglot, tmp_path, monkeypatch):
    def load_test(*arguments):
        raise AssertionError("selection asked for test classes")

    monkeypatch.setattr(run, "load_test", load_test)
    preset = PRESETS["smoke"]
    results = run.Results(preset, [])
    cell = Cell("omniglot", "scratch", "clean", "contrastive")
    jobs = [run.Job(cell, trial=trial) for trial in range(preset.trials)]
    failures = run.sweep(jobs, results, run.Where(omniglot, tmp_path), lambda record: None)
    assert failures == []
    assert results.selected(cell) in [METHODS["contrastive"].draw(t) for t in range(2)]


def test_training_validation_and_test_have_no_class_in_common(omniglot):
    test = classes(load_test("omniglot", "scratch", "clean", 0, omniglot).images)
    assert test == UNSEEN
    parts = {s: load_training("omniglot", s, "clean", 0, omniglot) for s in
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
    clean = load_training("omniglot", "scratch", "clean", 3, omniglot)
    noisy = load_training("omniglot", "scratch", condition, 3, omniglot)
    assert noisy.true_labels == clean.images.labels
    assert noisy.validation.labels == clean.validation.labels
    assert torch.equal(noisy.images.source, clean.images.source)
    told, true = np.array(noisy.images.labels), np.array(noisy.true_labels)
    wrong = told != true
    assert wrong.sum() == round(CONDITIONS[condition].noise * len(true))
    shift = (told - true)[wrong] % 48  # uniform over the 47 other classes
    counts = np.bincount(shift, minlength=48)[1:]
    expected = wrong.sum() / 47
    assert ((counts - expected) ** 2 / expected).sum() < 85  # chi squared, 46 degrees: p < 0.0005
    again = load_training("omniglot", "scratch", condition, 3, omniglot)
    other = load_training("omniglot", "scratch", condition, 4, omniglot)
    assert noisy.images.labels == again.images.labels != other.images.labels


@pytest.mark.parametrize(("condition", "left"), [("withheld50", 10), ("withheld75", 5)])
def test_the_same_share_of_each_class_is_withheld(condition, left, omniglot):
    given = load_training("omniglot", "scratch", condition, 0, omniglot)
    assert set(Counter(given.images.labels).values()) == {left}
    assert len(given.validation) == 12 * 20
    assert given.true_labels == given.images.labels


def test_the_long_tail_is_over_alphabets(omniglot):
    given = load_training("omniglot", "scratch", "long_tail", 5, omniglot)
    test = load_test("omniglot", "scratch", "long_tail", 5, omniglot)
    counts = Counter(given.images.labels)
    by_alphabet = {}
    for label, name in enumerate(given.images.names):
        by_alphabet.setdefault(data.alphabet(name), set()).add(counts[label])
    assert all(len(sizes) == 1 for sizes in by_alphabet.values())  # alike within an alphabet
    sizes = {alphabet: sizes.pop() for alphabet, sizes in by_alphabet.items()}
    geometric = [np.ceil(20 * 20 ** (-rank / 5) - 1e-9) for rank in range(6)]
    assert sorted(sizes.values(), reverse=True) == geometric
    assert geometric[0] == 20
    assert geometric[-1] == 1
    # Tested are unseen classes of the same alphabets, which neither training nor validation has.
    assert not classes(test.images) & (classes(given.images) | classes(given.validation))
    assert classes(test.images) < set(range(60))
    rare = {data.alphabet(test.images.names[label]) for label in test.rare}
    assert rare == set(sorted(sizes, key=sizes.get)[:2])  # a third of six
    order = load_training("omniglot", "scratch", "long_tail", 6, omniglot)
    assert Counter(order.images.labels) != counts


def test_classification_keeps_the_official_test_images_apart(cifar100):
    given = load_training("cifar100_classes", "scratch", "clean", 0, cifar100)
    test = load_test("cifar100_classes", "scratch", "clean", 0, cifar100).images
    assert set(Counter(test.labels).values()) == {100}
    assert classes(test) == {255}
    for tensor in tensors_within(given):
        assert 255 not in tensor
    assert set(given.images.labels) == set(given.validation.labels) == set(range(8))
    assert Counter(given.images.labels)[0] == 8
    assert Counter(given.validation.labels)[0] == 2


def test_classification_is_fine_tuned_on_and_tested_with_half_of_the_classes(cifar100):
    parts = {s: load_training("cifar100_classes", s, "clean", 0, cifar100) for s in
             ("scratch", "pretraining", "finetune")}  # fmt: skip
    halves = [classes(parts[s].images) for s in ("pretraining", "finetune")]
    assert halves[0] | halves[1] == classes(parts["scratch"].images)
    assert len(halves[0]) == len(halves[1]) == 4
    test = load_test("cifar100_classes", "finetune", "clean", 0, cifar100).images
    assert test.names == parts["finetune"].images.names == parts["finetune"].validation.names
    assert Counter(test.labels) == dict.fromkeys(range(4), 100)
    assert classes(test) == {255}
    for part in parts.values():
        assert all(255 not in tensor for tensor in tensors_within(part))


@pytest.mark.parametrize("condition", CONDITIONS)
def test_what_is_fine_tuned_saw_nothing_of_what_it_is_tuned_on_or_tested_with(
    condition, omniglot, tmp_path, monkeypatch
):
    given = []

    def load(*arguments):
        given.append(load_training(*arguments))
        return given[0]

    monkeypatch.setattr(run, "load_training", load)
    monkeypatch.setattr(run.training, "fit", lambda *arguments: {})
    cell = Cell("omniglot", "finetune", condition, "triplet")
    run.pretrained(PRESETS["smoke"], cell, 0, run.Where(omniglot, tmp_path))
    (before,) = given
    after = load_training("omniglot", "finetune", condition, 0, omniglot)
    test = load_test("omniglot", "finetune", condition, 0, omniglot)
    later = classes(after.images) | classes(after.validation) | classes(test.images)
    assert len(classes(before.images)) >= 18
    assert not classes(before.images) & later
    assert before.images.labels == before.true_labels


def test_batches_hold_as_many_of_each_class_or_come_as_they_are(omniglot):
    images = load_training("omniglot", "scratch", "clean", 0, omniglot).images
    sizes = data.Sizes.of(METHODS["triplet"], 48, 64, 64)
    batches = data.Batches(images, sizes, True, 3, torch.device("cpu"))
    assert len(batches) == 3
    for pixels, labels in batches:
        assert pixels.shape == (64, 1, 28, 28)
        assert set(Counter(labels.tolist()).values()) == {4}
        numbers = ((pixels[:, 0, 0, 0] + 1) * 127.5).round().long().tolist()
        names = [images.names[label] for label in labels]
        assert names == [f"alphabet{n // 10}/character{n % 10}" for n in numbers]
    square = data.Sizes.of(METHODS["smooth_ap"], 48, 64, 64)
    assert (square.per_class, square.batch) == (8, 64)
    drawn = data.Batches(images, sizes, False, 15, torch.device("cpu"))
    assert max(Counter(torch.cat([labels for _, labels in drawn]).tolist()).values()) == 20


@pytest.mark.skipif(
    not (data.ROOT / "omniglot28.npz").is_file(),
    reason=f"the real images are not in {data.ROOT}; PML_EXTRAS_DATA says where they are",
)
def test_the_real_splits():
    given = load_training("omniglot", "scratch", "clean", 0, data.ROOT)
    test = load_test("omniglot", "scratch", "clean", 0, data.ROOT).images
    assert len(given.images.names) + len(given.validation.names) == 964
    assert len(test.names) == 659
    assert not set(test.names) & {*given.images.names, *given.validation.names}


@pytest.mark.parametrize("by_class", [True, False])
def test_batches_leave_out(by_class):
    images = Images(
        torch.arange(40, dtype=torch.uint8).view(-1, 1, 1, 1), [i % 4 for i in range(40)],
        list("abcd"), 1,
    )  # fmt: skip
    sizes = Sizes(classes=4, embedding=2, per_class=2, batch=8)
    batches = data.Batches(images, sizes, by_class, 30, torch.device("cpu"))

    def drawn():
        pixels, labels = zip(*batches, strict=True)
        numbers = ((torch.cat(pixels).flatten() + 1) * 127.5).round().long()
        assert torch.equal(numbers % 4, torch.cat(labels))
        return set(numbers.tolist())

    assert drawn() == set(range(40))
    batches.leave_out([3, 7, 8])
    assert drawn() == set(range(40)) - {3, 7, 8}
    batches.leave_out([0])
    assert drawn() == set(range(1, 40))
    assert len(batches) == 30
