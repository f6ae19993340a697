"""How well wrong labels are found: the figures, not the finding."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.evidence import data, labels, plan, records, run

SMOKE = plan.PRESETS["smoke"]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """A tenth of the images."""

    def load(*arguments):
        images, true, validation = run.load_training(*arguments)
        kept = range(0, len(images), 10)
        return data.Training(images.subset(kept), [true[i] for i in kept], validation)

    monkeypatch.setattr(labels, "load_training", load)


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Trials of the one method on digits, made up."""
    monkeypatch.setattr(labels, "SEEDS", 2)
    monkeypatch.setattr(labels, "CONDITIONS", ("clean", "noise30"))
    with records.appending(tmp_path / "smoke.jsonl") as append:
        for condition in labels.CONDITIONS:
            cell = plan.Cell("digits", "scratch", condition, labels.METHOD)
            for trial in range(SMOKE.trials):
                setting = plan.METHODS[labels.METHOD].draw(trial)
                append(
                    cell._asdict()
                    | {"setting": setting, "budget": SMOKE.describe(), "trial": trial}
                    | {"validation": trial}
                )
    return tmp_path


def test_writes_a_line_a_run_and_goes_on(results):
    arguments = ["--preset", "smoke", "--results", str(results)]
    assert labels.main(arguments) == 0
    path = results / "labels-smoke.jsonl"
    whole = lines(path)
    assert {(r["dataset"], r["condition"], r["seed"]) for r in whole} == {
        ("digits", condition, seed) for condition in ("clean", "noise30") for seed in (0, 1)
    }
    for record in whole:
        assert record["setting"] == plan.METHODS[labels.METHOD].draw(SMOKE.trials - 1)
        assert ("precision" in record) == (record["condition"] == "noise30")
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    assert labels.main(arguments) == 0
    assert lines(path) == whole


def test_what_has_no_trials_is_named_and_left_out(results, capsys, monkeypatch):
    monkeypatch.setattr(labels, "CONDITIONS", ("clean", "withheld50", "long_tail"))
    assert labels.main(["--preset", "smoke", "--results", str(results)]) == 0
    assert "digits/scratch/long_tail/ntxent has no trials in" in capsys.readouterr().err
    # Few images are tuned as all are.
    conditions = [record["condition"] for record in lines(results / "labels-smoke.jsonl")]
    assert conditions == ["clean", "clean", "withheld50", "withheld50"]


def test_figures_are_those_of_the_distrusted(monkeypatch):
    """With looks that know the truth, of one sample less."""
    cell = plan.Cell("digits", "scratch", "noise30", labels.METHOD)
    given = labels.load_training("digits", "scratch", "noise30", 0, run.ROOT)
    wrong = np.array(given.images.labels) != np.array(given.true_labels)
    missed = int(wrong.argmax())

    class Knowing(labels.LabelNoiseDetector):
        def update(self, embeddings):
            self.scores[:] = 2.0
            self.scores[wrong] = 0.0
            self.scores[missed] = 3.0
            return self

    monkeypatch.setattr(labels, "LabelNoiseDetector", Knowing)
    quick = replace(SMOKE, budget=replace(SMOKE.budget, epochs=1, steps=1))
    setting = plan.METHODS[labels.METHOD].draw(0)
    found = labels.measure(quick, cell, setting, 0, run.ROOT)
    assert found["precision"] == 1
    assert found["recall"] == pytest.approx(1 - 1 / wrong.sum(), abs=1e-4)
    assert found["mistrusted"] == 0
    assert found["wrong"] == pytest.approx(wrong.mean(), abs=1e-4)
    assert 1 - 2 / wrong.sum() < found["average_precision"] < 1
