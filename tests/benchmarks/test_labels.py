"""The measurement of the detector: its numbers and its result lines."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.evidence import data, labels, records
from benchmarks.evidence.conditions import Experiment
from benchmarks.evidence.methods import METHODS
from benchmarks.evidence.presets import PRESETS

SMOKE = PRESETS["smoke"]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(autouse=True)
def fewer_images(monkeypatch):
    """Keep a tenth of the images."""

    def load(*arguments):
        images, true_labels, validation = data.load_train(*arguments)
        kept = range(0, len(images), 10)
        return data.TrainData(images.subset(kept), [true_labels[i] for i in kept], validation)

    monkeypatch.setattr(labels, "load_train", load)


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Synthetic trials on digits."""
    monkeypatch.setattr(labels, "SEEDS", 2)
    monkeypatch.setattr(labels, "CONDITIONS", ("clean", "noise30"))
    with records.appending(tmp_path / "smoke.jsonl") as append:
        for condition in labels.CONDITIONS:
            experiment = Experiment("digits", "scratch", condition, labels.METHOD)
            for trial in range(SMOKE.trials):
                hparams = METHODS[labels.METHOD].draw(trial)
                append(
                    experiment._asdict()
                    | {"hparams": hparams, "budget": SMOKE.budget._asdict(), "trial": trial}
                    | {"validation": trial}
                )
    return tmp_path


def test_writes_a_line_per_run_and_continues(results):
    arguments = ["--preset", "smoke", "--results", str(results)]
    assert labels.main(arguments) == 0
    path = results / "labels-smoke.jsonl"
    every = lines(path)
    assert {(r["dataset"], r["condition"], r["seed"]) for r in every} == {
        ("digits", condition, seed) for condition in ("clean", "noise30") for seed in (0, 1)
    }
    for record in every:
        assert record["hparams"] == METHODS[labels.METHOD].draw(SMOKE.trials - 1)
        assert ("precision" in record) == (record["condition"] == "noise30")
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    assert labels.main(arguments) == 0
    assert lines(path) == every


def test_experiments_without_trials_are_reported(results, capsys, monkeypatch):
    monkeypatch.setattr(labels, "CONDITIONS", ("clean", "withheld50", "long_tail"))
    assert labels.main(["--preset", "smoke", "--results", str(results)]) == 0
    assert "digits/scratch/long_tail/ntxent has no trials in" in capsys.readouterr().err
    # Withheld images use the hyperparameters of the clean condition.
    conditions = [record["condition"] for record in lines(results / "labels-smoke.jsonl")]
    assert conditions == ["clean", "clean", "withheld50", "withheld50"]


def test_measures_of_a_detector_that_misses_one_label(monkeypatch):
    experiment = Experiment("digits", "scratch", "noise30", labels.METHOD)
    train_data = labels.load_train(experiment.scenario, 0, None)
    wrong = np.array(train_data.images.labels) != np.array(train_data.true_labels)
    missed = int(wrong.argmax())

    class Oracle(labels.LabelNoiseDetector):
        def update(self, embeddings):
            self.vote_margins[:] = -1.0
            self.scores[:] = 2.0
            self.scores[wrong] = 0.0
            self.scores[missed] = 3.0
            return self

    monkeypatch.setattr(labels, "LabelNoiseDetector", Oracle)
    quick = replace(SMOKE, budget=SMOKE.budget._replace(epochs=1, steps_per_epoch=1))
    hparams = METHODS[labels.METHOD].draw(0)
    found = labels.measure(quick, experiment, hparams, 0, None)
    assert found["precision"] == 1
    assert found["recall"] == pytest.approx(1 - 1 / wrong.sum(), abs=1e-4)
    assert found["false_positive_rate"] == 0
    assert found["wrong"] == pytest.approx(wrong.mean(), abs=1e-4)
    assert 1 - 2 / wrong.sum() < found["average_precision"] < 1
